"""The lmms-eval side of the embedded image benchmark."""

from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableTask
from PIL import Image

from focuslib.tasks.tinyimage.build import load_docs
from focuslib.tasks.tinyvideo.questions import prompt
from focuslib.tasks.tinyvideo.utils import process_results

__all__ = ["TinyImageTask", "doc_to_text", "doc_to_visual", "process_results"]


class TinyImageTask(ConfigurableTask):
    """A stock task in all but where its documents come from: they are rendered on first use, never downloaded."""

    def __init__(self, config=None, model_name=None):
        super().__init__(config={k: v for k, v in (config or {}).items() if k != "class"}, model_name=model_name)

    def download(self, dataset_kwargs=None) -> None:
        split = self.config.test_split
        self.dataset = DatasetDict({split: Dataset.from_list(load_docs(split))})
        self.dataset_no_image = self.dataset


def doc_to_visual(doc: dict) -> list[Image.Image]:
    with Image.open(doc["image"]) as picture:
        return [picture.convert("RGB")]


def doc_to_text(doc: dict) -> str:
    return prompt(doc["question"], doc["options"])
