"""What a finished run says of its tensor-parallel matmuls."""

from megapar.train.summary import engine_lines

CHUNKED = "chunked, 4 pieces"


def test_which_engine_ran_in_each_layer() -> None:
    ran = {"head.weight": {"backward": "serial"}}
    for layer in (0, 10, 1, 2, 4):
        ran[f"layers.{layer}.attention.q.weight+layers.{layer}.attention.k.weight"] = {"backward": CHUNKED}
        ran[f"layers.{layer}.attention.out.weight"] = {"forward": CHUNKED}
        ran[f"layers.{layer}.mlp.down.weight"] = {"forward": "serial" if layer == 2 else CHUNKED}
    assert engine_lines(ran) == [
        "tp matmuls  forward chunked, 4 pieces: attention.out of layers 0-2, 4, 10; mlp.down of layers 0-1, 4, 10",
        "            forward serial: mlp.down of layer 2",
        "            backward serial: head",
        "            backward chunked, 4 pieces: attention.q+attention.k of layers 0-2, 4, 10",
    ]
    assert engine_lines({}) == []
