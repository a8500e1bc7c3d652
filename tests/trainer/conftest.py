import shutil

import pytest
from resume_support import crash, make_tree, run


@pytest.fixture(scope="module")
def crashed_once(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("crashed")
    tree = make_tree(folder, tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        crash(tree, patch)
    return folder, tree


@pytest.fixture
def crashed(tmp_path, crashed_once):
    """The config of a run that died in step 6, whose folder is the test's own."""
    folder, tree = crashed_once
    shutil.copytree(folder / "run", tmp_path / "run")
    return {**tree, "run": {"folder": str(tmp_path / "run")}}


@pytest.fixture(scope="module")
def weights_alone(tmp_path_factory, tiny_model):
    """Final weights of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("alone")
    run(make_tree(folder, tiny_model))
    return (folder / "run" / "model" / "model.safetensors").read_bytes()
