"""Quantize a network: one run from teacher to verified files."""

import time

from zsq.runs.origin import completed
from zsq.runs.pipeline import Result, carry_out
from zsq.runs.request import QuantizeRequest, takes
from zsq.runs.start import started


def quantize_request(request: QuantizeRequest) -> Result:
    """Quantize a classifier without its training data and write the files to a folder.

    Where `torchrun` has started several processes, all call this alike: they share the training, and the first one does
    the rest. All of them return the result.

    Returns:
        The record and the folder.

    Raises:
        InputError: an argument, setting or file does not fit.
        NumericsError: a loss is not finite.
        ExportError: the network has no file, which is known before anything is learnt; or the file does not compute
            what was simulated, and all files are kept.
    """
    begin, request = time.perf_counter(), completed(request)
    with started(
        request,
        quantizer=request.quantizer,
        bits=request.bits,
        flags={"target": request.target, "pixels": request.pixels, "batch": request.batch},
        data=request.data,
        class_names=request.class_names,
        decode=request.decode,
        checkpoint_every=request.checkpoint_every,
        rehearsed=True,
    ) as job:
        return carry_out(job, begin)


quantize = takes(QuantizeRequest)(quantize_request)
