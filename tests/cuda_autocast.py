"""CUDA's rules of autocast on any device, for machines without a GPU: under the CPU's rules a layer norm of
bfloat16 gives bfloat16, under CUDA's float32, and memory and rounding differ.

The lists are PyTorch's documentation's ("CUDA Ops that can autocast"), of what this code calls.
"""
import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

LOWER = set("""linear matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm addbmm einsum conv1d conv2d conv3d
    conv_transpose2d scaled_dot_product_attention prelu""".split())
FLOAT32 = set("""__pow__ __rpow__ __rdiv__ __rtruediv__ pow reciprocal rsqrt exp expm1 log log1p log2 log10
    acos asin cosh sinh tan cumprod cumsum prod sum norm vector_norm matrix_norm normalize cosine_similarity
    cdist layer_norm group_norm softmax log_softmax softplus mse_loss l1_loss smooth_l1_loss cross_entropy
    nll_loss kl_div binary_cross_entropy_with_logits logsumexp""".split())
# These take their tensors in the widest dtype among them.
WIDEST = set("addcmul addcdiv atan2 cross dot grid_sample index_put scatter_add tensordot cat stack".split())


class CudaAutocast(TorchFunctionMode):
    """In place of torch.autocast: within it, functions cast their float tensors as on CUDA."""
    dtype = None                                           # of the innermost one; None: it is not enabled

    def __init__(self, device_type, dtype=torch.bfloat16, enabled=True):
        super().__init__()
        self.wanted = dtype if enabled else None

    def __enter__(self):
        self.outer, CudaAutocast.dtype = CudaAutocast.dtype, self.wanted
        return super().__enter__()

    def __exit__(self, *reason):
        CudaAutocast.dtype = self.outer
        return super().__exit__(*reason)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name, target = kwargs or {}, function.__name__, None
        if CudaAutocast.dtype is not None and name in LOWER:
            target = CudaAutocast.dtype
        elif CudaAutocast.dtype is not None and name in FLOAT32 and "dtype" not in kwargs:
            target = torch.float32
        elif CudaAutocast.dtype is not None and name in WIDEST:
            wide = any(t.dtype == torch.float32 for t in _tensors((args, kwargs)))
            target = torch.float32 if wide else None
        if target is not None:
            args, kwargs = _cast((args, kwargs), target)
        return function(*args, **kwargs)


def _tensors(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _tensors(part)


def _cast(x, dtype):
    if isinstance(x, torch.Tensor):
        return x.to(dtype) if x.dtype in (torch.float32, torch.bfloat16) else x
    if isinstance(x, dict):
        return {name: _cast(part, dtype) for name, part in x.items()}
    return type(x)(_cast(part, dtype) for part in x) if type(x) in (list, tuple) else x


def checkpoint(function, *inputs, **options):
    """torch.utils.checkpoint's, which in the backward pass enters PyTorch's autocast again, not this one."""
    dtype = CudaAutocast.dtype

    def within(*inputs):
        with CudaAutocast("cuda", dtype, dtype is not None):
            return function(*inputs)

    return torch.utils.checkpoint.checkpoint(within, *inputs, **options)
