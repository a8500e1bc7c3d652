"""Adapters of other packages, one file each, and the only places that import them.

Each function takes a ``Problem``, raises ``UnavailableError`` with the reason where the package cannot do it, and
returns a callable that runs forward and backward once. Peers are called as their documentation says, in their fastest
configuration that keeps their accuracy; the docstring of each says which that is.
"""
