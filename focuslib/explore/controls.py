"""The controls of a live view that need the model: clip, question, method and its settings; run, progress, cancel."""

import html
import tempfile
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from focuslib.errors import UserError
from focuslib.explore.recorder import Cancelled
from focuslib.explore.view import Cancel, Progress
from focuslib.methods import METHODS, Method
from focuslib.methods.settings import make_method
from focuslib.models.base import Media

UPLOADS = ".mp4,.webm,.mkv,.mov,.avi,.png,.jpg,.jpeg,.webp,.gif"
GIVEN = "(the clip given in the call)"

# (media, question, method, progress, cancelled) → nothing; raises UserError or Cancelled
Run = Callable[[Media, str, Method, Progress, Cancel], None]


class Controls:
    """The form above a view. box: the widget to display.

    run: runs the model and shows the result; called in a thread, so that cancel works. defaults: a method of a name,
    with the settings for the model. examples: label → (media, question), to choose from.
    """

    def __init__(
        self,
        media: Media,
        question: str,
        method: Method,
        run: Run,
        defaults: Callable[[str], Method],
        examples: dict[str, tuple[Media, str]] | None = None,
    ):
        self._given = media
        self._run = run
        self._defaults = defaults
        self._examples = examples or {}
        self._uploads = tempfile.TemporaryDirectory(prefix="focus-upload-")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        is_path = isinstance(media, (str, Path))
        wide, name = widgets.Layout(flex="1 1 auto", width="auto"), {"description_width": "64px"}
        self.example = widgets.Dropdown(options=["", *self._examples], description="example", style=name)
        self.clip = widgets.Text(
            str(media) if is_path else GIVEN, description="clip", continuous_update=False, layout=wide, style=name,
            tooltip="path of a video or an image on this machine",
        )  # fmt: skip
        self.upload = widgets.FileUpload(accept=UPLOADS, description="upload")
        self.question = widgets.Textarea(question, description="question", rows=2, layout=wide, style=name)
        self.method = widgets.Dropdown(options=list(METHODS), value=method.name, description="method", style=name)
        self.settings = widgets.Box(layout=widgets.Layout(display="flex", flex_flow="row wrap"))
        self.start = widgets.Button(description="Run", button_style="primary", icon="play")
        self.cancel = widgets.Button(description="Cancel", icon="stop", disabled=True)
        self.progress = widgets.FloatProgress(0, min=0, max=1, layout=widgets.Layout(width="220px"))
        self.status = widgets.HTML()
        self._fields: dict[str, widgets.Widget] = {}
        self._show_settings(method)
        self.example.observe(self._choose_example, "value")
        self.upload.observe(self._take_upload, "value")
        self.method.observe(lambda change: self._show_settings(self._defaults(change["new"])), "value")
        self.start.on_click(lambda button: self.begin())
        self.cancel.on_click(lambda button: self._stop.set())
        sources = [self.clip, self.upload] if not self._examples else [self.example, self.clip, self.upload]
        form = widgets.VBox([
            widgets.HBox(sources),
            self.question,
            widgets.HBox([self.method, self.start, self.cancel, self.progress, self.status]),
            widgets.Accordion([self.settings], titles=("settings of the method",)),
        ])  # fmt: skip
        form.layout.max_width = "1256px"
        self.box = form

    def report(self, share: float, text: str, error: bool = False) -> None:
        """Show how far a run is, or in one line why it failed."""
        self.progress.value = share
        colour = "color: var(--jp-error-color1, #c62828)" if error else ""
        self.status.value = f'<span style="{colour}">{html.escape(text)}</span>'

    def chosen(self) -> tuple[Media, str, Method]:
        """What the form says. Raises UserError for a setting that makes no method."""
        path = self.clip.value.strip()
        settings = {name: field.value for name, field in self._fields.items()}
        return self._given if path == GIVEN else path, self.question.value, make_method(self.method.value, settings)

    def begin(self) -> None:
        """Run what the form says, in a thread."""
        if self.start.disabled:
            return
        self.start.disabled = True
        self._stop.clear()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def attempt(self, media: Media, question: str, method: Method) -> str:
        """One run with its progress shown; returns why it did not succeed, in one line, or an empty text."""
        self.start.disabled, self.cancel.disabled = True, False
        error = ""
        try:
            self._run(media, question, method, self.report, self._stop.is_set)
        except Cancelled:
            error = "cancelled; the view shows the run before"
        except UserError as problem:
            error = str(problem)
        finally:
            self.start.disabled, self.cancel.disabled = False, True
        self.report(0 if error else 1, error or "done", bool(error))
        return error

    def _work(self) -> None:
        try:
            self.attempt(*self.chosen())
        except UserError as problem:
            self.report(0, str(problem), error=True)
        except Exception as problem:  # nobody reads a thread's traceback
            self.report(0, f"{type(problem).__name__}: {' '.join(str(problem).split())}", error=True)
        finally:
            self.start.disabled = False

    def _show_settings(self, method: Method) -> None:
        """A field for each hyper-parameter, as its type needs it."""
        self._fields = {}
        for field in fields(method):
            value, name = getattr(method, field.name), field.name.replace("_", " ")
            if isinstance(value, bool):
                self._fields[field.name] = widgets.Checkbox(value, description=name, indent=False)
            else:
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                self._fields[field.name] = widgets.Text(text, description=name, style={"description_width": "initial"})
        self.settings.children = list(self._fields.values())

    def _choose_example(self, change: dict[str, Any]) -> None:
        if change["new"]:
            media, self.question.value = self._examples[change["new"]]
            self._set_media(media)

    def _set_media(self, media: Media) -> None:
        if isinstance(media, (str, Path)):
            self.clip.value = str(media)
        else:
            self._given, self.clip.value = media, GIVEN

    def _take_upload(self, change: dict[str, Any]) -> None:
        for file in change["new"]:
            path = Path(self._uploads.name) / Path(file["name"]).name
            path.write_bytes(file["content"])
            self.clip.value = str(path)
