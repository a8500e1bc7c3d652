"""Metadata is in pyproject.toml. This file is where the optional native extension (csrc/) will be declared."""

from setuptools import setup

setup()
