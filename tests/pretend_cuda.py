"""A CUDA device that is not there: tensors that say they are on cuda:0, hold their values on the CPU, and
obey a GPU's rules, so that a script's own main() can be run against these rules on any machine.

The rules, each broken one a RuleBroken:
    an operation's tensors are all on one device (a scalar tensor on the CPU may join, as in PyTorch)
    a collective's tensors, and DistributedDataParallel's, are on the GPU
What makes the host wait for the GPU is not an error. It is counted, with the line of ours that asked for it:
numbers read back, sizes that depend on values, copies to the host, copies from memory that is not pinned.

Autocast casts by CUDA's lists (cuda_autocast.py).

What it cannot show: speed, memory, races between streams, differences between CUDA's kernels and the CPU's.
"""
import contextlib
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import common
import losses
from cuda_autocast import CudaAutocast, checkpoint
from frozen import pretrained
from runtime import meter, processes

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.device("cuda", 0)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2",
         "repeat_interleave"}
# These want all of their tensors on one device, scalars too.
STRICT = {"cat", "stack"}
COPIES = {"_to_copy", "copy_", "_copy_from"}


class RuleBroken(AssertionError):
    pass


class Pretended(torch.Tensor):
    """`inner`, a CPU tensor, that says it is on cuda:0.

    To C++ it is on the meta device, since a build without CUDA has no device guard for any other; autocast
    and autograd go by the backend's keys, which are CUDA's.
    """

    @staticmethod
    def __new__(cls, inner):
        with torch.inference_mode(False), _disable_current_modes():
            shape = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
            outer = torch.Tensor._make_subclass(cls, shape, False, device_for_backend_keys=CUDA)
        outer.inner = inner
        return outer

    device = property(lambda self: CUDA)
    is_cuda, is_cpu, is_meta = True, False, False

    def to(self, *args, **kwargs):
        target = args[0] if args else kwargs.get("device")
        here = isinstance(target, (str, torch.device)) and torch.device(target).type == "cuda"
        if here and len(args) == 1 and set(kwargs) <= {"device", "non_blocking"}:
            return self                                        # as for any tensor that is where it should be
        return super().to(*args, **kwargs)

    def tolist(self):
        return self.cpu().tolist()                                          # PyTorch refuses, for subclasses

    def __format__(self, spec):
        return format(self.item() if self.ndim == 0 else repr(self), spec)

    def numpy(self, *args, **kwargs):
        raise RuleBroken(f"{our_line()}: numpy() of a tensor on cuda:0")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return ACTIVE[0].dispatch(function, args, kwargs or {})

    def __deepcopy__(self, memo):
        copy = Pretended(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return memo.setdefault(id(self), copy)

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)                  # a checkpoint holds the values

    def __repr__(self):
        return f"Pretended({self.inner})"


ACTIVE = []                                                                 # the Gpu in use


def leaves(x):
    """What is in nested lists, tuples and dicts. torch's own functions for this take twice as long."""
    if isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from leaves(part)
    else:
        yield x


def tree_map(function, x):
    """function of each of these, in the same lists, tuples and dicts."""
    if isinstance(x, (list, tuple)):
        return type(x)([tree_map(function, part) for part in x])
    if isinstance(x, dict):
        return {key: tree_map(function, part) for key, part in x.items()}
    return function(x)


def our_line():
    """The innermost line of this project, not of its tests, that is running: "data.py:12"."""
    frame = sys._getframe(2)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.parent == ROOT or path.parent.parent == ROOT and path.parent.name != "tests":
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Gpu(TorchDispatchMode):
    """The device while it is entered: `waits` counts by line, `operations` in all; `collectives` lists them,
    (line, shapes)."""

    def __init__(self):
        super().__init__()
        self.waits, self.collectives, self.operations = Counter(), [], 0
        self.pinned = {}                                               # id -> tensor: kept, so ids are theirs

    def __enter__(self):
        ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *reason):
        ACTIVE.remove(self)
        return super().__exit__(*reason)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():                # then composite operations (to, item) come whole
            with self:
                out = function.decompose(*args, **kwargs or {})
            if out is not NotImplemented:
                return out
        return self.dispatch(function, args, kwargs or {})

    def dispatch(self, function, args, kwargs):
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        pretended = [t for t in tensors if isinstance(t, Pretended)]
        plain = [t for t in tensors if not isinstance(t, Pretended)]
        asked = kwargs.get("device")
        on_gpu = torch.device(asked).type != "cpu" if asked is not None else bool(pretended)
        if pretended:
            self.operations += 1
            bad = [t for t in plain if t.ndim or name in STRICT]
            if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
                bad = plain if not isinstance(args[0], Pretended) else []  # a GPU tensor may have CPU indices
                self.waits[our_line()] += bool(plain)                      # which are sent, unpinned
                indices = [i for i in args[1] if i is not None]
                self.waits[our_line()] += any(i.dtype == torch.bool for i in indices)
            if bad and name not in COPIES:
                raise RuleBroken(f"{our_line()}: {function} got cuda:0 and cpu {tuple(bad[0].shape)}")
            if name in WAITS:
                self.waits[our_line()] += 1
        if name in COPIES:
            self.copy(name, args, kwargs, on_gpu)
        if name == "_fused_sdp_choice" and pretended:
            return 0                                                   # attention written out: no CUDA kernel
        inner = lambda x: (x.inner if isinstance(x, Pretended) else torch.device("cpu")
                           if isinstance(x, torch.device) else x)
        before = {id(t.inner): t for t in pretended}
        plain_kwargs = {k: inner(v) if not isinstance(v, str) or k != "device" else "cpu"
                        for k, v in kwargs.items() if k != "pin_memory"}
        out = function(*tree_map(inner, args), **tree_map(inner, plain_kwargs))
        if not on_gpu and name != "copy_":
            return out
        # In place: the tensor that came in goes out.
        outer = lambda x: (x if not isinstance(x, torch.Tensor) or isinstance(x, Pretended)
                           else before.get(id(x)) if id(x) in before
                           else x if name == "copy_" else Pretended(x))
        return tree_map(outer, out)

    def copy(self, name, args, kwargs, on_gpu):
        """Count a copy between the devices, unless it is from pinned memory and the host need not wait."""
        source, target_on_gpu = ((args[1], isinstance(args[0], Pretended)) if name == "copy_"
                                 else (args[0], on_gpu))
        if isinstance(source, Pretended) == target_on_gpu:
            return
        asynchronous = kwargs.get("non_blocking") or name == "copy_" and len(args) > 2 and args[2]
        on_host = source if target_on_gpu else args[0] if name == "copy_" else None
        if not (asynchronous and id(on_host) in self.pinned):
            self.waits[our_line()] += 1

    def event(self):
        """A torch.cuda.Event. The host may wait for it once the GPU has been given more to do."""
        recorded = []

        def synchronize():
            self.waits[our_line()] += self.operations - recorded[0] < 10

        return SimpleNamespace(record=lambda: recorded.append(self.operations), synchronize=synchronize)

    def all_reduce(self, tensor, op, world):
        """As if all processes had the same values."""
        self.collective(tensor)
        if op == dist.ReduceOp.SUM:
            tensor.mul_(world)

    def collective(self, *tensors):
        self.collectives.append((our_line(), [tuple(tensor.shape) for tensor in tensors]))
        for tensor in tensors:
            if not isinstance(tensor, Pretended):
                raise RuleBroken(f"{our_line()}: a collective under NCCL got a CPU tensor, "
                                 f"{tuple(tensor.shape)}")


def replace_everywhere(patch, name, value):
    """Put value in place of processes.NAME, also in the modules that imported it by name."""
    real = getattr(processes, name)
    for module in list(sys.modules.values()):
        if vars(module).get(name) is real:
            patch.setattr(module, name, value)


class DistributedDataParallel(torch.nn.Module):
    """As torch's to the caller; sends nothing."""

    def __init__(self, module, device_ids=None, **options):
        super().__init__()
        self.module = module
        ACTIVE[0].collective(*module.parameters())

    def forward(self, *args, **options):
        return self.module(*args, **options)

    def no_sync(self):
        return contextlib.nullcontext()


@contextlib.contextmanager
def pretend_cuda(monkeypatch, world=1, rank=0):
    """Within it torch has one GPU, and this process is `rank` of `world`. Yields the Gpu."""
    pretrained.channel_constants.cache_clear()                              # made once a process and device
    with monkeypatch.context() as patch, Gpu() as gpu:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "Event", gpu.event)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
        patch.setattr(meter, "product_speed", lambda device, dtype: 1e12)
        patch.setattr(torch.cuda, "device_count", lambda: world)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: CUDA)
        patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
        patch.setattr(torch, "autocast", CudaAutocast)
        patch.setattr(common, "checkpoint", checkpoint)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: gpu.pinned.setdefault(id(tensor), tensor))
        # Module.to would put a GPU's data into a parameter of the CPU's class.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)                 # torch.tensor(x, device=) by way of the CPU
        if world > 1:
            for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
                patch.setenv(name, str(value))
            patch.setattr(dist, "is_initialized", lambda: True)
            patch.setattr(dist, "get_world_size", lambda group=None: world)
            patch.setattr(dist, "get_rank", lambda group=None: rank)
            replace_everywhere(patch, "barrier", lambda: gpu.collective())
            patch.setattr(dist, "broadcast_object_list", lambda objects: gpu.collective())
            patch.setattr(dist, "all_reduce", lambda tensor, op=dist.ReduceOp.SUM, async_op=False: (
                gpu.all_reduce(tensor, op, world), SimpleNamespace(wait=lambda: None))[1])
            patch.setattr(processes, "DistributedDataParallel", DistributedDataParallel)
            patch.setattr(losses.dist_grad, "all_reduce",
                          lambda tensor: (gpu.collective(tensor), tensor * world)[1])
        try:
            with torch.autograd.set_multithreading_enabled(False):         # a mode belongs to its thread
                yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            torch._C._set_only_lift_cpu_tensors(False)
            pretrained.channel_constants.cache_clear()
