"""The cffi hook; everything else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["csrc/build_kernels.py:ffibuilder"])
