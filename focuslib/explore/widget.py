"""Explore what a method does to a clip: one line opens an interactive view in a notebook.

    explore(vlm, "clip.mp4", "What happens?", method=Focus())

The drawing (static/explore.js) is one component: a widget in a live notebook, a self-contained page anywhere else.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import traitlets
from IPython.display import HTML, Image, display

from focuslib.errors import UserError
from focuslib.evaluation.settings import method_settings
from focuslib.explore.controls import Controls
from focuslib.explore.page import SCRIPT, STYLE, page_html, view_html, view_png
from focuslib.explore.view import Cancel, Progress, ViewData, run_view, trace_view
from focuslib.methods import Focus, Method
from focuslib.methods.settings import make_method
from focuslib.models.base import VLM, Media
from focuslib.models.layout import TokenLayout
from focuslib.tasks.tinyvideo.build import load_docs
from focuslib.tasks.tinyvideo.questions import TASKS, prompt

PICTURE_DELAY = 2.0  # seconds after the last change before the picture is drawn again

_RENDER = """
export default {
  render({ model, el }) {
    let explorer = null, timer = 0;
    const save = (state) => {
      clearTimeout(timer);
      timer = setTimeout(() => { model.set("state", state); model.save_changes(); }, 150);
    };
    const show = async () => {
      if (!model.get("data").byteLength) return;
      const view = await readView(model.get("data")), state = model.get("state");
      const { threshold, token, ...kept } = state; // these two belong to the run before
      explorer?.destroy();
      explorer = mountExplorer(el, view, explorer ? kept : state, save);
      save(explorer.state);
    };
    const follow = () => {
      const state = model.get("state");
      if (explorer && JSON.stringify(state) !== JSON.stringify(explorer.state)) explorer.set(state);
    };
    model.on("change:data", show);
    model.on("change:state", follow);
    show();
    return () => explorer?.destroy();
  },
};
"""


class Canvas(anywidget.AnyWidget):
    """The drawing in a live notebook. data: ViewData.pack(). state: what is shown now, both ways."""

    _esm = SCRIPT + _RENDER
    _css = STYLE
    data = traitlets.Bytes(b"").tag(sync=True)
    state = traitlets.Dict().tag(sync=True)


class View:
    """An open view. Showing it in a notebook displays the drawing, and a picture of it for viewers without scripts.

    data: what is shown, None until a run succeeded. error: why the last run did not, one line. canvas: the widget; its
    `state` says and sets the frame, layer, site, overlay, vector, token and threshold shown.
    """

    def __init__(self, data: ViewData | None = None):
        self.data: ViewData | None = None
        self.error = ""
        self.canvas = Canvas()
        self.box: widgets.Widget = self.canvas
        self._picture = None
        self._timer: threading.Timer | None = None
        self.canvas.observe(self._picture_later, "state")
        if data is not None:
            self.update(data)

    def update(self, data: ViewData) -> None:
        """Show other data. The state is kept as far as it fits, but for the token and the threshold."""
        self.data = data
        self.canvas.state = {
            name: value for name, value in self.canvas.state.items() if name not in ("threshold", "token")
        }
        self.canvas.data = data.pack()
        self._picture_later()

    def html(self) -> str:
        """A self-contained piece of HTML that shows the view without a kernel or a network, at the current state."""
        return view_html(self._shown(), self.canvas.state)

    def save(self, path: str | Path) -> Path:
        """Write the view as one HTML file that opens offline."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page_html(self._shown().title, self.html()), encoding="utf-8")
        return path

    def png(self) -> bytes:
        """A picture of the current state."""
        return view_png(self._shown(), self.canvas.state)

    def show(self, live: bool = True) -> None:
        """Display the view: live, or (for executed notebooks) as HTML that needs no kernel."""
        if live:
            display(self.box)
        elif self.data is not None:
            display(HTML(self.html()))
        else:
            print(self.error)
        self._picture = display(self._image(), display_id=True)

    def _ipython_display_(self) -> None:
        self.show()

    def _shown(self) -> ViewData:
        if self.data is None:
            raise UserError(f"the view shows nothing yet ({self.error or 'no run succeeded'})")
        return self.data

    def _image(self) -> Image | HTML:
        return HTML("") if self.data is None else Image(self.png())

    def _draw_picture(self) -> None:
        if self._picture is not None:
            self._picture.update(self._image())

    def _picture_later(self, change: dict[str, Any] | None = None) -> None:
        """Draw the picture again once the state has rested: it costs half a second."""
        if self._picture is None:
            return
        if self._timer:
            self._timer.cancel()
        self._timer = threading.Timer(PICTURE_DELAY, self._draw_picture)
        self._timer.daemon = True
        self._timer.start()


class Explorer(View):
    """A view with the controls that run the model again."""

    def __init__(
        self,
        vlm: VLM,
        media: Media,
        question: str,
        method: Method,
        probe: Focus,
        examples: dict[str, tuple[Media, str]] | None = None,
    ):
        super().__init__()
        self.vlm = vlm
        self.probe = probe
        self._dense: dict[tuple[Any, str], str] = {}  # answers of the dense model
        self.controls = Controls(media, question, method, self._run, lambda name: default_method(name, vlm), examples)
        self.box = widgets.VBox([self.controls.box, self.canvas])

    def run(self, media: Media, question: str, method: Method) -> None:
        """Run the model and show the result; `error` says in one line why that failed."""
        self.error = self.controls.attempt(media, question, method)

    def _run(self, media: Media, question: str, method: Method, progress: Progress, cancelled: Cancel) -> None:
        key = (str(media) if isinstance(media, (str, Path)) else id(media), question)
        data = run_view(
            self.vlm, media, question, method, self.probe,
            dense_answer=self._dense.get(key), progress=progress, cancelled=cancelled,
        )  # fmt: skip
        self._dense[key] = data.answers["dense"]
        self.update(data)


def explore(
    vlm: VLM,
    media: Media,
    question: str,
    method: Method | None = None,
    *,
    probe: Focus | None = None,
    examples: dict[str, tuple[Media, str]] | None = None,
) -> Explorer:
    """Run a model on a question about a video or an image, once dense and once under a method, and open a view of it.

    method: Focus with the settings for the model by default. probe: what the similarities are measured with when the
    method is not Focus. examples: label → (media, question), offered in the view's controls.
    A clip that cannot be read is one line in the view (`error`).
    """
    method = method or default_method("focus", vlm)
    if probe is None:
        probe = method if isinstance(method, Focus) else _default_focus(vlm)
    view = Explorer(vlm, media, question, method, probe, examples)
    progress = display(view.controls.progress, display_id=True)
    view.run(media, question, method)
    if progress is not None:
        progress.update(HTML(""))
    return view


def explore_trace(path: str | Path, media: Media | None = None, layout: TokenLayout | None = None) -> View:
    """A view of a recorded native trace (.trace), without a model. Raises UserError if the file cannot be read.

    media: the trace's clip, for the pictures. layout: of its tokens, from a VLM's `layout`; else as the strides say.
    """
    return View(trace_view(path, media, layout))


def tiny_examples(each: int = 3) -> dict[str, tuple[str, str]]:
    """First questions of each task of the embedded benchmark, built on first use: label → (clip, prompt)."""
    return {
        f"{task} {number}: {doc['question']} ({doc['answer_text']})": (
            doc["video"],
            prompt(doc["question"], doc["options"]),
        )
        for task in TASKS
        for number, doc in enumerate(load_docs(task, "test")[:each])
    }


def _default_focus(vlm: VLM) -> Focus:
    method = default_method("focus", vlm)
    assert isinstance(method, Focus)
    return method


def default_method(name: str, vlm: VLM) -> Method:
    """A method with the settings for a model from params/methods.yaml; outside the project, with its own defaults."""
    try:
        settings = method_settings(name, vlm.name, "", adapter=type(vlm).name)
    except UserError:
        settings = {}
    return make_method(name, settings)
