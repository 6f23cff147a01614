"""Metadata lives in pyproject.toml; this file exists for extension modules."""

from setuptools import setup

setup()
