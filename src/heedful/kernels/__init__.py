"""Our own Triton kernels: tensors in, tensors out.

``import heedful`` and the scan for strategies load none of this, nor triton.

``operands`` the call as a value, ``arguments`` how it is made of a strategy's; ``forward`` the forward
pass; ``tiles`` block sizes, warps and stages as data; ``aot`` compilation for GPUs that are not here; ``jit`` what runs
on the device.
"""
