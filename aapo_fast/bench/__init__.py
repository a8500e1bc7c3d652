"""Microbenchmarks of the fused loss: floors, our implementations and everybody else's, on the same inputs.

    shapes      which heads, how many rows, what kind of rows (no torch: the command line reads it)
    inputs      the tensors of a case, by its seed
    truth       float64, streamed; errors against it
    methods     what is compared: floors, ours, PyTorch's own, and through ``peers`` other packages
    clock       alternating rounds; ``memory`` peak extra memory
    work        one case from beginning to end;  head   one after another into a JSON file
    accuracy    the table of errors alone
    tables, plots, report    from JSON files to Markdown and pictures

``aapo-fast bench --help`` is the way in. Nothing here is imported by the loss or the trainer.
"""
