"""How many bytes of activations autograd keeps alive, for a test and a benchmark."""

import torch


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
