"""The AAPO trainer. ``loop.train`` is the algorithm; everything else here is one of its parts."""
