"""Mutants: small mechanical changes of a blank's solution, which its tests have to reject.

    python course/mutants.py A2                 # every mutant of A2 that no test rejects, with its line
    python course/mutants.py A2 --blank A2.3    # of one blank
    python course/mutants.py A1 A2 A3 A4 --seed 7
    python course/mutants.py A2 --list          # names alone, nothing runs

A wrong answer of bank/ is a misunderstanding that somebody thought of; a mutant is what a syntax tree allows:
another operator, another constant, a cast or a keyword left out. Nobody has to think of it, so mutants find
what no test looks at. One that survives needs a test, or a line in EQUIVALENT that says why nobody can tell
it from the solution.
"""
import argparse
import ast
import functools
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))          # called as a script, from anywhere

import common  # noqa: E402
from runtime import processes  # noqa: E402
from common import UserError  # noqa: E402
from course import assignments, blanks, check, grade  # noqa: E402

SECONDS = 5          # of processor time, for one test on one mutant: more means rejected

# {mutants that no test can reject: why}. "A4.1 ... detached": all of A4.1 with "detached" in its name; then
# no test may reject any of them.
EQUIVALENT = {
    # A1
    "A1.2 ... .float() dropped": "cos and sin are float32: a product with them is, too",
    "A1.3 ... index detached": "whole numbers have no gradient",
    "A1.3 ... - dropped": "the last of two axes",
    "A1.4 ... detached": "HOG is a target: hog_features, which calls it, runs without a graph",
    "A1.4 ... - dropped": "the last two of four axes",
    "A1.5 ... detached": "a constant has no gradient",
    "A1.5 ... dtype= dropped": "whole numbers minus a float are float32, unless the default dtype is changed",
    "A1.6 line 5: max() dropped for argument 0": "the size of a group is a matter of speed",
    "A1.6 line 5: 1 to 2": "the same",
    "A1.6 line 5: // to %": "the same",
    "A1.6 line 5: * to /": "the same",
    "A1.6 line 6: condition False": "the same",
    "A1.6 ... == to !=": "the same",
    "A1.6 ... last arguments of hypot swapped": "symmetric",
    "A1.6 ... line 18: 2 to 1": "more windows than needed, cut to size",
    "A1.6 ... line 18: 1 to 2": "the same",
    "A1.6 ... last arguments of transpose swapped": "symmetric",
    # A2
    "A2.1 ... 1e-09 to 2e-09": "both lie far below 1 and far above rounding",
    "A2.1 ... detached": "bools have no gradient",
    "A2.8 ... target detached": "the target is data: training differentiates the prediction alone",
    "A2.8 ... mask detached": "bools have no gradient",
    "A2.8 line 2: .float() dropped": "float32 * bool is float32, and int64 counts hidden patches exactly",
    "A2.9 ... argument gradient of all_mean detached": "autograd.grad without create_graph gives no graph",
    "A2.9 ... result detached": "the same",
    "A2.9 ... .detach() dropped": "the same",
    "A2.9 line 5: 0 to -1 (2)": "norms are not negative",
    "A2.10 ... last arguments of mse_loss swapped": "symmetric",
    "A2.10 ... last arguments of lpips swapped": "symmetric",
    "A2.10 ... argument images": "images are data: training differentiates the reconstruction alone",
    "A2.10 ... line 8:": "`differentiated` asks for the gradient of the reconstruction alone",
    "A2.10 ... mask detached": "bools have no gradient",
    "A2.10 ... argument mask of loss detached": "the same",
    "A2.10 ... argument y of loss detached": "the target is data",
    # A3
    "A3.1 line 2: result 2 detached": "a constant has no gradient",
    "A3.1 line 2: result 3 detached": "the same",
    "A3.3 line 0: target detached": "the target is data: training differentiates the prediction alone",
    "A3.4 ... detached": "whole numbers have no gradient",
    "A3.4 ... dtype= dropped": "of a list of bools it is bool anyway; no batch is empty",
    "A3.8 line 5: .to() dropped": "float64 + bfloat16 is float64, exactly",
    "A3.10 ... y detached": "whole numbers have no gradient",
    "A3.10 ... argument y of model detached": "the same",
    "A3.10 ... dtype= dropped": "torch.full of a float is float32, unless the default dtype is changed",
    "A3.11 ... <= to <": "at the edge of the tolerance itself nothing is promised",
    "A3.12 ... y detached": "whole numbers have no gradient",
    "A3.12 ... null detached": "the same",
    "A3.12 ... argument y of call detached": "the same",
    # A4: A4.1 to A4.7 are measures, which nothing differentiates.
    "A4.1 ... detached": "a float has no gradient",
    "A4.1 line 8: condition True": "eigvalsh of a 0 x 0 matrix is empty, and its sum 0",
    "A4.1 ... float() dropped": "numpy's float64 is a float",
    "A4.2 ... detached": "two shares have no gradient",
    "A4.2 line 5: .double() dropped": "any common centre does",
    "A4.2 line 6: .double() dropped": "the centre is float64, and so is the difference",
    "A4.2 line 11: .double() dropped": "the bound covers this rounding, too",
    "A4.2 line 26: <= to <": "the bound forgives more than equality",
    "A4.2 line 27: <= to <": "the same",
    **dict.fromkeys((f"A4.2 line 10: {what}" for what in (
        "+ to -", "* to / (2)", "6 to 7", "6 to 5", "1 to 0", "4 to 5", "4 to 3", "24 to 25", "24 to 23")),
        "a bound for rounding, far above what occurs: half or twice of it is as good"),
    "A4.2 ... device= dropped": "seen on a GPU alone",
    "A4.3 ... detached": "nothing differentiates PSNR",
    "A4.3 ... .double() dropped": "uint8 - float64 is float64",
    "A4.4 ... detached": "nothing differentiates axes",
    "A4.4 line 6: condition True": "both branches find the same axes; one is faster",
    "A4.4 line 6: >= to >": "the same",
    "A4.4 line 6: 1 to 0": "the same",
    "A4.4 ... .clamp() dropped": "rounding leaves a variance of 0 at -1e-15 of the largest",
    "A4.4 line 11: 0 to -1": "the only axis",
    "A4.4 line 11: 0 to -1 (2)": "as without the clamp",
    "A4.4 line 12: 0 to -1": "the only axis",
    "A4.4 ... int() dropped": "a tensor of one integer indexes as well",
    "A4.5 ... detached": "a fit has no gradient",
    "A4.5 line 2: .to() dropped": "int64 * float is float",
    "A4.5 ... .item() dropped": "scipy takes a tensor of one number",
    "A4.5 ... .double() dropped": "scipy converts the gradient",
    "A4.5 ... method= dropped": "scipy's default is BFGS, with the same minimum",
    "A4.5 ... zeros to ones": "the loss is convex: any start leads to its minimum",
    "A4.5 ... 1e-06 to 2e-06": "where to stop; the test asks for 1e-4",
    "A4.5 line 9: * to /": "an infinite loss, which scipy's line search takes for one that does not rise",
    "A4.6 ... detached": "nothing differentiates the likelihood",
    "A4.7 ... detached": "nothing differentiates a step of EM",
    "A4.7 ... dtype= dropped": "a block's sum in float32 rounds no more than float32 densities do",
    "A4.8 line 0: x detached": "fit_score differentiates with respect to the means alone",
}

OTHER = {ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt),
         ast.GtE: (ast.Gt, ast.LtE), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
         ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
         ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
         ast.FloorDiv: (ast.Mod, ast.Div), ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,),
         ast.And: (ast.Or,), ast.Or: (ast.And,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,)}
SIGN = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
        ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in", ast.Add: "+", ast.Sub: "-", ast.Mult: "*",
        ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**", ast.And: "and", ast.Or: "or",
        ast.BitAnd: "&", ast.BitOr: "|", ast.Not: "not", ast.USub: "-", ast.Invert: "~"}
# Methods that are dropped, x.float() -> x; those whose name ends in _ are, too.
DROPPED = {"detach", "clone", "float", "double", "long", "bool", "to", "clamp", "clip", "abs", "square",
           "flip", "expand", "item", "log", "exp"}
FUNCTIONS = {"max", "min", "abs", "float", "int"}        # f(a, b) -> a, and -> b
NAMES = {"max": "min", "min": "max", "amax": "amin", "ceil": "floor", "cos": "sin", "sin": "cos",
         "sum": "mean", "mean": "sum", "zeros": "ones", "any": "all", "zeros_like": "ones_like",
         "ones_like": "zeros_like"}
NO_VALUES = {"len", "to", "reshape", "isinstance", "range", "repeat", "split"}     # detach() changes nothing


class Mutant(NamedTuple):
    """One changed body. `line` counts from 1 in the solution's own."""
    name: str       # "A2.1 line 3: < to <="
    blank: tuple    # a bank.blank.Blank
    body: str       # indented, without docstring and comments
    before: str     # the line, and what it becomes; both as `ast` writes them
    after: str

    @property
    def put(self):
        """{place: code object}, as runner.py takes it."""
        source = blanks.replace_body((ROOT / self.blank.file).read_text(), self.blank.name, self.body)
        return {f"{self.blank.file}:{self.blank.name}":
                grade.code_of(source, self.blank.file, self.blank.name)}


# ------------------------------------------------ the changes -----------------------------------------------

def changed(node, **fields):
    """A copy of the node with other fields."""
    return ast.copy_location(type(node)(**dict(ast.iter_fields(node)) | fields), node)


def detached(node):
    return ast.Call(ast.Attribute(node, "detach", ast.Load()), [], [])


def is_own(node):
    """self.name"""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def without(items, i):
    return [*items[:i], *items[i + 1:]]


def changes(node):
    """(what, node instead) for everything that can be done to this one node of a syntax tree."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in OTHER[type(op)]:
                yield (f"{SIGN[type(op)]} to {SIGN[other]}",
                       changed(node, ops=[*node.ops[:i], other(), *node.ops[i + 1:]]))
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        for other in OTHER.get(type(node.op), ()):
            yield f"{SIGN[type(node.op)]} to {SIGN[other]}", changed(node, op=other())
    if isinstance(node, ast.UnaryOp):
        yield f"{SIGN[type(node.op)]} dropped", node.operand
    if isinstance(node, ast.Constant):
        yield from ((f"{node.value} to {value}", ast.Constant(value)) for value in constants(node.value))
    if isinstance(node, (ast.If, ast.IfExp)):
        for value in (True, False):
            yield f"condition {value}", changed(node, test=ast.Constant(value))
    if isinstance(node, ast.Call):
        yield from changed_calls(node)
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        items = node.value.elts
        for i in range(len(items) - 1):
            swapped = [*items[:i], items[i + 1], items[i], *items[i + 2:]]
            yield f"results {i} and {i + 1} swapped", changed(node, value=changed(node.value, elts=swapped))
        for i, item in enumerate(items):
            new = [*items[:i], detached(item), *items[i + 1:]]
            yield f"result {i} detached", changed(node, value=changed(node.value, elts=new))
    elif isinstance(node, ast.Return):
        yield "result detached", changed(node, value=detached(node.value))
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        yield f"{node.targets[0].id} detached", changed(node, value=detached(node.value))
    if isinstance(node, ast.BinOp):
        for side in ("left", "right"):
            if is_own(operand := getattr(node, side)):
                yield f"{ast.unparse(operand)} detached", changed(node, **{side: detached(operand)})
    if isinstance(node, ast.AugAssign) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "statement dropped", ast.Pass()


def constants(value):
    """Other values of a constant."""
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return value + 1, value - 1
    if isinstance(value, float):
        return (2 * value if value else 1.0,)
    return ()


def changed_calls(node):
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if isinstance(node.func, ast.Attribute):
        if name in DROPPED or name.endswith("_"):
            yield f".{name}() dropped", node.func.value
        if name in NAMES:
            yield f"{name} to {NAMES[name]}", changed(node, func=changed(node.func, attr=NAMES[name]))
    elif name in FUNCTIONS:
        yield from ((f"{name}() dropped for argument {i}", item) for i, item in enumerate(node.args))
    for i, keyword in enumerate(node.keywords):
        yield f"{keyword.arg or '**'}= dropped", changed(node, keywords=without(node.keywords, i))
    if (len(node.args) > 1 and name not in ("max", "min")
            and not any(isinstance(item, ast.Starred) for item in node.args)):
        *first, a, b = node.args
        yield f"last arguments of {name} swapped", changed(node, args=[*first, b, a])
    for i, item in enumerate(node.args):
        if (isinstance(item, ast.Name) or is_own(item)) and name not in NO_VALUES and name[-5:] != "_like":
            yield (f"argument {ast.unparse(item)} of {name} detached",
                   changed(node, args=[*node.args[:i], detached(item), *node.args[i + 1:]]))
    if isinstance(node.func, ast.Attribute) and is_own(owner := node.func.value):
        yield (f"{ast.unparse(owner)} of {name} detached",
               changed(node, func=changed(node.func, value=detached(owner))))


def places(node):
    """(node, put) of every node below this one, in the order of the text; put(other) exchanges it. What an
    error says is left out."""
    for field, value in ast.iter_fields(node):
        if isinstance(value, list):
            parts = [(item, functools.partial(value.__setitem__, i)) for i, item in enumerate(value)]
        else:
            parts = [(value, functools.partial(setattr, node, field))]
        for part, put in parts:
            if isinstance(part, ast.AST) and not isinstance(part, (ast.Raise, ast.JoinedStr)):
                yield part, put
                yield from places(part)


def changed_bodies(body, arguments=()):
    """(line, what, text) of every mutant of a function's body; line 0 comes before it.

    arguments: names of the function's own. Some mutants change nothing that can be seen, and some cannot run.
    """
    tree = ast.parse(textwrap.dedent(body))
    same = ast.unparse(tree)
    for name in arguments:
        yield 0, f"{name} detached", f"{name} = {name}.detach()\n{same}"
    line = 1
    for node, put in places(tree):
        line = getattr(node, "lineno", line)
        for what, other in changes(node):
            put(other)
            text = ast.unparse(tree)
            put(node)
            if text != same:
                yield line, what, text


def mutants(blank):
    """All Mutants of a blank, in the order of its lines, the same at every call. Under torch.no_grad nothing
    is detached."""
    source = (ROOT / blank.file).read_text()
    node = blanks.find(source, blank.name).node
    arguments = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
    body = blanks.body(source, blank.name)
    before = ast.unparse(ast.parse(textwrap.dedent(body))).splitlines()
    graph = "no_grad" not in blanks.signature(source, blank.name)
    found, times = [], {}
    for line, what, text in sorted(changed_bodies(body, arguments), key=lambda entry: entry[0]):
        if "detached" in what and not graph:
            continue
        name = f"{blank.id} line {line}: {what}"
        times[name] = times.get(name, 0) + 1
        name += f" ({times[name]})" if times[name] > 1 else ""
        after = text.splitlines()
        old = [a for a in before if a not in after]
        new = [a for a in after if a not in before]
        indent = " " * (node.col_offset + 4)
        found.append(Mutant(name, blank, textwrap.indent(text, indent),
                            " | ".join(a.strip() for a in old), " | ".join(a.strip() for a in new)))
    return found


# ---------------------------------------------------- run ---------------------------------------------------

def judged(listed, seed=0):
    """Run the blanks' tests on these mutants, as they run on wrong answers.

    Returns {name: verdict}: the test that rejects it, "cannot run" for a detach() of what is no tensor, and
    None where all tests pass. Raises UserError where the tests do not run to their end.
    """
    rounds = [dict(name=m.name, put=m.put, tests=[*m.blank.tests, *m.blank.hidden], first=True, limit=SECONDS)
              for m in listed]
    entries, trouble = check.run(rounds, seed, seconds=3600)
    if trouble:
        last = entries[-1].get("round")
        raise UserError(f"the mutants' tests did not end: {trouble}, in or after {last!r}")
    verdict = dict.fromkeys((m.name for m in listed))
    for entry in entries:
        if entry.get("outcome") == "failed":
            cannot = "detached" in entry["round"] and "has no attribute 'detach'" in entry["reason"]
            verdict[entry["round"]] = "cannot run" if cannot else entry["test"]
    return verdict


def matches(key, name):
    """Whether a key of EQUIVALENT names this mutant."""
    first, _, last = key.partition(" ... ")
    return name == key or bool(last) and name.startswith(first + " ") and last in name


def report(name, listed, verdict, blank=None):
    """Print what is left of an assignment's mutants, and how many are not. Returns the number of faults:
    survivors without a reason, and reasons without a survivor."""
    ran = [m for m in listed if verdict[m.name] != "cannot run"]
    alive = [m for m in ran if verdict[m.name] is None]
    keys = [key for key in EQUIVALENT if key.startswith(f"{name}.") and blank in (None, key.split()[0])]
    left = [m for m in alive if not any(matches(key, m.name) for key in keys)]
    stale = [key for key in keys if not any(matches(key, m.name) for m in alive)
             or any(matches(key, m.name) and verdict[m.name] for m in ran)]
    for m in left:
        print(f"{m.name}\n    - {m.before}\n    + {m.after}")
    for key in stale:
        print(f"EQUIVALENT names a mutant that is rejected, or none: {key}")
    print(f"{name}: {len(ran)} mutants, {len(ran) - len(alive)} rejected, {len(alive) - len(left)} known to "
          f"be equivalent, {len(left)} left; ", end="")
    return len(left) + len(stale)


def main(argv=None):
    """Run the command line (argv without the program's name; None: sys.argv)."""
    parser = common.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("assignments", nargs="+", choices=[name for name, b in assignments.ASSIGNMENTS.items() if b])
    add("--blank", help="this one alone, A2.3")
    add("--seed", type=common.number(common.Seed), default=0, help="of the hidden tests' data (default 0)")
    add("--list", action="store_true", help="print all names with their lines; run nothing")
    args = parser.parse_args(argv)
    faults = 0
    for name in args.assignments:
        listed = [m for b in assignments.ASSIGNMENTS[name] if args.blank in (None, b.id) for m in mutants(b)]
        if not listed:
            raise UserError(f"{name} has no blank {args.blank}")
        if args.list:
            print("\n".join(f"{m.name}\n    {m.before}\n    {m.after}" for m in listed))
            continue
        begun = time.time()
        verdict = judged(listed, args.seed)
        faults += report(name, listed, verdict, args.blank)
        print(f"{time.time() - begun:.0f} s", flush=True)
    if faults:
        raise UserError(f"{faults} faults, listed above: what survives needs a test or a reason")


if __name__ == "__main__":
    processes.run(main)
