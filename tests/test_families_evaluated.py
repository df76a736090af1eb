"""The generic adapter through lmms-eval: every method on the embedded benchmark, and questions about several images."""

import pytest
import torch
from PIL import Image
from tiny_models import clip

from focuslib.evaluation.datasets import DATASETS
from focuslib.evaluation.evaluate import evaluate
from focuslib.evaluation.lmms import FocusLmms
from focuslib.methods import Adaptiv, Cmc, Dense, Focus, FrameFusion
from focuslib.models import load
from focuslib.prefill.trace import Trace

torch.set_num_threads(1)
METHODS = [
    Dense(),
    Focus(selected_layers=(0, 2), retention=(0.6, 0.3), vector_size=8, m_tile=64),
    FrameFusion(cost=0.5),
    Adaptiv(threshold=0.3),
    Cmc(linear_threshold=0.7, interval=3, i_frame=1),
]


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "smolvlm"])
def test_every_method_answers_every_question(family_checkpoint, name, tmp_path):
    vlm, dataset = load(family_checkpoint(name), device="cpu", frames=6), DATASETS["tinyvideo_motion"]
    dataset.prepare()
    for method in METHODS:
        traces = []

        def save(task, number, run, traces=traces):
            traces.append(tmp_path / f"{number}.trace")
            run.trace.save(traces[-1])

        result = evaluate(vlm, method, dataset, limit=2, save_trace=save if method.name == "focus" else None)
        assert not result.failures and len(result.samples) >= 2
        assert all(sample["num_frames"] > 1 for sample in result.samples)
        if method.name == "focus":
            assert len(traces) == len(result.samples)
            for file in traces:
                trace = Trace.load(file)
                assert trace.medium.tolist() == [0] * trace.grid.length
                trace.save_pth(file.with_suffix(".pth"))
                stored = torch.load(file.with_suffix(".pth"), weights_only=True)
                assert stored["group_idx"]["q_proj"].shape[2] == trace.grid.length


class Request:
    def __init__(self, number: int):
        self.args = ("<image> or <image>?", {"max_new_tokens": 2}, lambda doc: doc, number, "task", "test")


def test_questions_about_several_images(family_checkpoint):
    images = [Image.fromarray(clip(1, seed)[0]) for seed in range(2)]
    docs = [images, [images[0]], [], [clip(4), images[0]]]
    for name, answered in (("qwen3_vl", [0, 1, 3]), ("mistral3", [0, 1])):
        model = FocusLmms(load(family_checkpoint(name), device="cpu"), METHODS[1])
        model.task_dict = {"task": {"test": docs}}
        assert len(model.generate_until([Request(number) for number in range(len(docs))])) == len(docs)
        entries = [model.records["task", number] for number in range(len(docs))]
        assert [number for number, entry in enumerate(entries) if "error" not in entry] == answered
        assert entries[2]["final"] and "no image or video" in entries[2]["error"]
        if name == "mistral3":
            assert entries[3]["final"] and "mistral3 takes no videos" in entries[3]["error"]
    one = FocusLmms("tiny_onevision", Dense(), device="cpu")
    one.task_dict = {"task": {"test": docs}}
    one.generate_until([Request(0)])
    assert one.records["task", 0]["error"] == "2 images or videos in this question; tiny_onevision takes one"
