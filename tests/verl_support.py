"""What the tests on verl share."""

import hydra


def verl_config(*overrides):
    """verl's own configuration with a command line's overrides."""
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides=["algorithm.adv_estimator=aapo", *overrides])
