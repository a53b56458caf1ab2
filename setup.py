"""The cffi hook, and the tag of a wheel without the extension; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):  # type: ignore[misc]
    """Tags a wheel into which no extension went as one for any machine, which it is.

    Under the tag of a native one it would be taken for that, wherever wheels are kept.
    """

    def get_tag(self) -> tuple[str, str, str]:
        """The tag, once the files of the wheel are in their place."""
        self.root_is_pure = not any(Path(self.bdist_dir, "fed_learn", "kernels").glob("_native.*"))
        impl, abi, platform = super().get_tag()
        return (impl, abi, "any") if self.root_is_pure else (impl, abi, platform)


setup(cffi_modules=["csrc/build_kernels.py:ffibuilder"], cmdclass={"bdist_wheel": Wheel})
