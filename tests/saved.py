"""How much memory a step takes, for tests and benchmarks: what autograd keeps alive, the largest tensor."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made, forward or backward."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


class Saved:
    """Counts the bytes of activations that autograd keeps alive, and their peak."""

    def __init__(self):
        self.now = self.peak = 0

    def __enter__(self):
        counter = self

        class Holder:
            def __init__(self, tensor):
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                counter.now += self.size
                counter.peak = max(counter.peak, counter.now)

            def __del__(self):
                counter.now -= self.size

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Holder, lambda holder: holder.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)
