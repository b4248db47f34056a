"""A step recorded as one CUDA graph. For small networks a GPU spends most of a step waiting for
Python to start the next kernel; a graph starts all of its kernels at once.
"""
import torch


class Recorded:
    """compute(*tensors) -> tensor, recorded at its fourth call and replayed from then on.

    compute: forward, loss and backward of a step, from zero_grad on. Nothing in it may wait for the
    GPU. Whatever is not one of `tensors` is a constant of the recording: make a new one when such a
    number changes. parameters: those whose .grad the optimiser, which stays outside, reads.
    The first three calls run plainly, in which cuDNN makes its choices, and so does every call
    whose shapes are not those of the recording, like an epoch's tail.
    """

    def __init__(self, compute, parameters):
        self.compute, self.parameters = compute, list(parameters)
        self.calls, self.graph, self.side = 0, None, torch.cuda.Stream()

    def __call__(self, *tensors):
        self.calls += 1
        if self.calls == 4:
            self.inputs = [tensor.clone() for tensor in tensors]
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = self.compute(*self.inputs)
            self.grads = [p.grad for p in self.parameters]
        if not self.graph or any(a.shape != b.shape for a, b in zip(self.inputs, tensors)):
            # On a stream of its own, as PyTorch asks of what is recorded later.
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                result = self.compute(*tensors)
            torch.cuda.current_stream().wait_stream(self.side)
            return result
        for own, tensor in zip(self.inputs, tensors):
            own.copy_(tensor)
        self.graph.replay()
        # A plain call in between has put others in their place.
        for p, grad in zip(self.parameters, self.grads):
            p.grad = grad
        return self.result.clone()
