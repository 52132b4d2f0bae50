"""Functions that other assignments ask for: in this folder they work, and cannot be read.

solved.bin has their texts, packed, so that nobody reads by accident what they are still to write. It is no
secret: the code is public. Each file whose functions are meant calls put() behind its last definition.
"""
import json
import zlib
from pathlib import Path

TEXTS = json.loads(zlib.decompress(Path(__file__).with_name("solved.bin").read_bytes()))


def put(file, names):
    """Give the functions of a file, whose module has these names, the code that solves them."""
    for name, text in TEXTS[file].items():
        code, found = compile(text, f"solved.bin: {name}", "exec"), names
        for part in name.split("."):
            code = next(c for c in code.co_consts if getattr(c, "co_name", None) == part)
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        while hasattr(found, "__wrapped__"):
            found = found.__wrapped__
        found.__code__ = code
