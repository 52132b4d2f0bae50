"""The files of a submission, as students send them: a folder or a zip, in a folder of its own or not, with or
without an environment and what operating systems put beside it.
"""
import os
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from common import UserError
from course import assignments

LARGEST = 1 << 20                      # bytes of a source file, several times that of the longest here
MOST = 5000                            # files of the names that are looked for
WANTED = {"ASSIGNMENT", "ENVIRONMENT", "report.md", "report.pdf", "config.json",
          *(PurePosixPath(b.file).name for listed in assignments.ASSIGNMENTS.values() for b in listed)}
# Folders with other people's code, beside those whose names begin with a dot.
NOT_THEIRS = {"__pycache__", "__MACOSX", "node_modules", "site-packages", "dist-packages", "venv", "env"}


class Submission:
    """The files of a folder or a zip that can matter, by their path from its top: only regular ones, only
    small ones. A link could lead to the solution."""

    def __init__(self, path):
        self.zip, self.files, self.root = None, {}, PurePosixPath(".")
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                inside = PurePosixPath(Path(folder).relative_to(path).as_posix())
                folders[:] = sorted(f for f in folders if self.theirs(inside / f / "ASSIGNMENT"))
                for name in sorted(names):
                    full = Path(folder, name)
                    if self.theirs(inside / name) and stat.S_ISREG(full.lstat().st_mode):
                        self.files[str(inside / name)] = full, full.stat().st_size
        else:
            try:
                self.zip = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as e:
                raise UserError(f"{path} is neither a folder nor a zip file: {e}") from e
            for info in self.zip.infolist():
                inside = PurePosixPath(info.filename.replace("\\", "/"))
                if not info.is_dir() and self.theirs(inside):
                    self.files[str(inside)] = info, info.file_size
        if found := self.find("ASSIGNMENT"):
            self.root = PurePosixPath(found).parent

    def theirs(self, path):
        """Whether a file of that path is looked at."""
        return (len(self.files) < MOST and path.name in WANTED
                and not any(part.startswith(".") or part in NOT_THEIRS for part in path.parts))

    def find(self, file):
        """The path of `file`: beside ASSIGNMENT, where it belongs; else the least deep of those that end like
        it or have its name (Gradescope's upload of single files forgets folders). None: not there."""
        parts = PurePosixPath(file).parts
        there = sorted((PurePosixPath(p) for p in self.files),
                       key=lambda p: (self.root not in p.parents, len(p.parts), str(p)))
        for tail in (parts, parts[-1:]):
            for path in there:
                if path.parts[-len(tail):] == tail:
                    return str(path)
        return None

    def text(self, file):
        """The file's text, without a byte-order mark and with "\\n" alone as the end of lines. ValueError,
        with the reason, for one that is missing, too large or not UTF-8."""
        path = self.find(file)
        if path is None:
            raise ValueError(f"{file} is not in the submission")
        where, size = self.files[path]
        if size > LARGEST:
            raise ValueError(f"{path} has {size} bytes; {LARGEST} are the most")
        try:
            with where.open("rb") if self.zip is None else self.zip.open(where) as entry:
                data = entry.read(LARGEST + 1)
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:   # Runtime: a password
            raise ValueError(f"{path} cannot be read: {e}") from None
        if "\0" in text:
            raise ValueError(f"{path} is not a text in UTF-8: choose this encoding where your editor saves")
        return text.replace("\r\n", "\n").replace("\r", "\n")
