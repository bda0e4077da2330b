"""Targets: the runtimes that a file is written for, and the grids that each of them computes with."""

from dataclasses import dataclass

from zsq.errors import InputError, unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime, and what its integer kernels take; simulation, training and file follow it."""

    name: str
    """Its name on the command line."""
    title: str
    """Its name in texts."""
    runs_in: str
    """Package in which the file is run and checked."""
    symmetric_activations: bool = False
    """Whether activations are int8 with zero point 0; else uint8 with any."""
    symmetric_weights: bool = False
    """Whether weights leave out -128, the integer without an opposite."""
    float_biases: bool = False
    """Whether biases stay float; else int32 at input scale times weight scale."""
    integer_operators: bool = True
    """Whether hard swish, hard sigmoid and lone batch norms may be computed on integers in the file."""
    rounds_addends: bool = True
    """Whether what a layer gives to an addition alone is rounded first; else the layer adds in float, and the sum is
    rounded."""
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """Widths of activations that the file can make saturate."""
    on_processors: bool = True
    """Whether it computes on processors, of which some add products of neighbours in int16
    (`zsq.quantization.pair_sums`); elsewhere no kernel of this machine is its."""
    all_activations: bool = False
    """Whether every activation has to be quantized, also those that no layer reads."""

    def check_bits(self, text: str, activation: int) -> None:
        """Check that the file can hold activations of a width.

        Raises:
            InputError: it cannot; the text says what would do.
        """
        if activation not in self.activation_bits:
            widths = ", ".join(str(width) for width in self.activation_bits)
            raise InputError(
                f"bits is '{text}', and files for {self.title} hold activations of {widths} bits; narrower weights "
                f"are fine: W{text.upper().lstrip('WINT')[:1]}A{self.activation_bits[-1]}."
            )


TARGETS = {
    target.name: target
    for target in (
        Target(name="onnxruntime", title="ONNX Runtime", runs_in="onnxruntime"),
        Target(name="openvino", title="OpenVINO", runs_in="openvino", rounds_addends=False),
        Target(
            name="tensorrt",
            title="TensorRT",
            runs_in="onnxruntime",
            symmetric_activations=True,
            symmetric_weights=True,
            float_biases=True,
            integer_operators=False,
            activation_bits=(8,),
            on_processors=False,
            all_activations=True,
        ),
    )
}
"""Every target by its name."""


def target_of(name: str) -> Target:
    """Return the target of a name.

    Raises:
        InputError: there is none; the text quotes the nearest.
    """
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    return TARGETS[name]
