"""Boxes that a function of the user's reads from a network's outputs."""

import torch

from zsq.data.datasets import DataSet, EvenSubset
from zsq.errors import InputError
from zsq.evaluation.measures import BoxTally, Decoder
from zsq.models.own_code import own_function
from zsq.models.teacher import Teacher
from zsq.types import ImageSpec

TRIED = 8
"""Images on which a decoder is tried."""


def own_decoder(text: str, spec: ImageSpec) -> Decoder:
    """Return the function that `--decode` names.

    Args:
        text: FILE.py:FUNCTION or MODULE:FUNCTION.
        spec: of the network whose outputs it reads.

    Raises:
        InputError: there is none, or the network gives what no box is.
    """
    if not spec.outputs:
        raise InputError(f"--decode is {text}, and the network gives one vector of logits, which no box is.")
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"--decode is '{text}'; FILE.py:FUNCTION or MODULE:FUNCTION is expected.")
    return own_function(place, name, "function")


@torch.no_grad()
def tried_decoder(text: str, teacher: Teacher, data: DataSet | EvenSubset) -> Decoder:
    """Return the function that `--decode` names, tried on what the float network gives for a few images.

    Args:
        text: FILE.py:FUNCTION or MODULE:FUNCTION.
        teacher: the float network.
        data: images on which boxes are measured.

    Raises:
        InputError: there is no such function, it fails, or the data say of no boxes.
    """
    decoder, spec = own_decoder(text, teacher.spec), teacher.spec
    if not data.labelled:
        raise InputError(f"data set '{data.name}' has no boxes, with which those that {text} reads are compared.")
    batch = next(data.batches(min(TRIED, spec.images_at_once)))
    device = next(teacher.network.parameters()).device
    BoxTally(spec.outputs, decoder).add(teacher.network(batch.images.to(device)).cpu(), batch.labels)
    return decoder
