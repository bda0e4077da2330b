"""Targets: the runtimes that a file is written for, and the grids that each of them computes with."""

from dataclasses import dataclass
from pathlib import PurePath

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
    file: str = "model.onnx"
    """Name of its file in a run's folder."""
    symmetric_activations: bool = False
    """Whether activations are int8 with zero point 0; else uint8 with any."""
    symmetric_weights: bool = False
    """Whether weights leave out -128, the integer without an opposite."""
    float_biases: bool = False
    """Whether biases stay float; else int32 at input scale times weight scale."""
    integer_gates: bool = True
    """Whether hard swish and hard sigmoid may be clips and products of integers in the file."""
    integer_sigmoids: bool = False
    """Whether SiLU and GELU are products of their input and an integer sigmoid in the file; else they stay float."""
    float_attention: bool = False
    """Whether softmax, norms over features and products of two activations are computed in float, and what goes from
    one to the next is not rounded; else every value is."""
    integer_norms: bool = True
    """Whether a lone batch norm may be a convolution of integers in the file."""
    least_volume_channels: int = 0
    """Channels from which a convolution of volumes is quantized; one of fewer is float where integers take longer."""
    rounds_addends: bool = True
    """Whether what a layer gives to an addition alone is rounded first; else the layer adds in float, and the sum is
    rounded."""
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """Widths of activations that the file can make saturate."""
    keeps_pairs: bool = True
    """Whether weights keep sums of neighbours' products within int16, as kernels of some processors need
    (`zsq.quantization.pair_sums`); an ONNX file without that is run literally here."""
    packs: bool = False
    """Whether the file can hold weights of 4 bits or fewer two to a byte."""
    all_activations: bool = False
    """Whether every activation has to be quantized, also those that no layer reads."""

    @property
    def suffix(self) -> str:
        """How the name of its file ends, such as `.onnx`."""
        return PurePath(self.file).suffix

    @property
    def exported_file(self) -> str:
        """Name of its file in the folder of a run for another target, such as `model_openvino.onnx`."""
        return f"model_{self.name}{self.suffix}"

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
        Target(
            name="onnxruntime",
            title="ONNX Runtime",
            runs_in="onnxruntime",
            integer_sigmoids=True,
            float_attention=True,
            least_volume_channels=8,
        ),
        Target(name="openvino", title="OpenVINO", runs_in="openvino", rounds_addends=False),
        Target(
            name="litert",
            title="LiteRT",
            runs_in="ai_edge_litert",
            file="model.tflite",
            packs=True,
            symmetric_weights=True,
            integer_gates=False,
            keeps_pairs=False,
            all_activations=True,
        ),
        Target(
            name="executorch",
            title="ExecuTorch",
            runs_in="executorch",
            file="model.pte",
            symmetric_weights=True,
            integer_gates=False,
            integer_norms=False,
            activation_bits=(8,),
            keeps_pairs=False,
            all_activations=True,
        ),
        Target(
            name="tensorrt",
            title="TensorRT",
            runs_in="onnxruntime",
            symmetric_activations=True,
            symmetric_weights=True,
            float_biases=True,
            integer_gates=False,
            integer_norms=False,
            activation_bits=(8,),
            keeps_pairs=False,
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
