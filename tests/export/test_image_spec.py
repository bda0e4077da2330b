from zsq.export.image_spec import from_json, to_json
from zsq.types import ImageSpec


def test_a_note_is_read_as_it_was_written() -> None:
    spec = ImageSpec(channels=1, height=8, width=9, classes=5, mean=(0.1,), std=(1 / 3,), resize=12)
    assert from_json(to_json(spec)) == spec
    assert to_json(spec).startswith('{"channels": 1, "classes": 5, ')  # in one order, so that files are the same
