"""Words of the schedule's second format in what leaves the package: exported directories, sentences, refusals."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests import parity
from tests.test_method_matrix import ROWS
from tests.tiny import llava_batch
from vtwcli.errors import UsageError
from vtwcli.export.hf.export import export_hf
from vtwcli.export.onnx.export import removals
from vtwcli.methods import METHODS
from vtwcli.models.loading import load
from vtwcli.schedule.sentences import describe

NEWER = ("pyramiddrop", "himap", "sparsevlm", "sparsevlm_plus", "v2drop", "dart")


@pytest.mark.parametrize("name", NEWER)
def test_an_exported_directory_runs_it(name, tiny_dir, tmp_path):
    schedule = METHODS[name](**ROWS[name]).schedule()
    assert schedule.format_version == 2
    export_hf(str(tiny_dir), schedule, tmp_path / "out")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    plain = load(str(tiny_dir)).model
    batch = llava_batch(["t3 i t5", "t2 i t3 i t2"])
    expected, logits = parity.generated(plain, batch, schedule)
    out, found = parity.generated(exported, batch, None)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(found, logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", NEWER)
def test_graphs_refuse_it_with_a_reason(name):
    with pytest.raises(UsageError, match="cannot be exported to ONNX"):
        removals(METHODS[name](**ROWS[name]).schedule(), 6)


def test_sentences():
    said = {name: describe(METHODS[name]().schedule().actions[0], 32) for name in NEWER}
    assert said == {
        "pyramiddrop": "From layer 8 of 32 on only 0.5 of the prompt's visual tokens (most attention from the last "
        "token, as the layer itself sees it) remain; rows behind those that left move up.",
        "himap": "From layer 2 of 32 on only 0.5 of the prompt's visual tokens (most attention from the text behind "
        "the image) remain.",
        "sparsevlm": "From layer 3 of 32 on only 0.521 of the prompt's visual tokens (most attention from the text "
        "that the image suits) remain; rows behind those that left move up; the best of the others are "
        "merged into clusters.",
        "sparsevlm_plus": "From layer 3 of 32 on only 0.521 of the prompt's visual tokens (most attention from the "
        "text that the image suits, in the 14 heads that read the image most, levelled by distance) remain.",
        "v2drop": "From layer 3 of 32 on only 0.5 of the prompt's visual tokens (largest change by the layer before) "
        "remain.",
        "dart": "From layer 2 of 32 on only 0.333 of the prompt's visual tokens (least like a few pivots) remain.",
    }
