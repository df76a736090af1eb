"""The embedded benchmark for lmms-eval: the task class that builds its data, and the functions the YAMLs name."""

import re

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask

from focuslib.tasks.tinyvideo.build import load_docs
from focuslib.tasks.tinyvideo.questions import LETTERS, prompt


class TinyVideoTask(ConfigurableTask):
    """A stock task in all but where its documents come from: they are rendered on first use, never downloaded."""

    def __init__(self, config=None, model_name=None):
        super().__init__(config={k: v for k, v in (config or {}).items() if k != "class"}, model_name=model_name)

    def download(self, dataset_kwargs=None) -> None:
        split = self.config.test_split
        self.dataset = DatasetDict({split: Dataset.from_list(load_docs(self.config.dataset_name, split))})
        self.dataset_no_image = self.dataset


def doc_to_visual(doc: dict) -> list[str]:
    return [doc["video"]]


def doc_to_text(doc: dict) -> str:
    return prompt(doc["question"], doc["options"])


def read_letter(response: str) -> str | None:
    """The option a response chooses: ``B``, ``(B)``, ``B. red``, ``The answer is B``; None where no letter stands."""
    found = re.search(rf"(?<![A-Za-z])([{LETTERS}])(?![A-Za-z])", response)
    return found.group(1) if found else None


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return {"acc": float(read_letter(results[0]) == doc["answer"])}
