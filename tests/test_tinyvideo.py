"""The embedded benchmark: seeded, balanced, true to its scenes, and readable after a round trip through mp4."""

from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from focuslib.evaluation.guess import majority
from focuslib.paths import params_folder, read_yaml
from focuslib.tasks.tinyvideo import build as builder
from focuslib.tasks.tinyvideo.build import load_docs, task_docs, write_video
from focuslib.tasks.tinyvideo.questions import CHOICES, LETTERS, TASKS, prompt, questions
from focuslib.tasks.tinyvideo.scenes import ASKED, BORDERS, FRAMES, LEVELS, PLACES, render, sample_scene, token_objects


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("kind", FRAMES)
def test_same_seed_same_bytes(kind):
    first, again = (render(sample_scene("test", kind, 7)) for _ in range(2))
    assert first.shape == (FRAMES[kind], 96, 96, 3) and first.dtype == np.uint8
    assert first.tobytes() == again.tobytes()


def test_splits_differ():
    clips = {
        render(sample_scene(split, kind, i)).tobytes()
        for split in ("train", "tune", "test")
        for kind in FRAMES
        for i in range(3)
    }
    assert len(clips) == 3 * len(FRAMES) * 3


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no scenes for split 'dev'"):
        sample_scene("dev", "needle", 0)


@pytest.mark.parametrize(("split", "size"), builder.QUESTIONS.items())
@pytest.mark.parametrize("task", TASKS)
def test_docs_are_balanced_and_of_full_size(task, split, size):
    docs = task_docs(task, split)
    assert len(docs) == size and len({d["id"] for d in docs}) == size
    letters = Counter(d["answer"] for d in docs)
    assert set(letters.values()) == {size // 4}
    for doc in docs:
        assert len(set(doc["options"])) == 4
        assert doc["options"][LETTERS.index(doc["answer"])] == doc["answer_text"]
    kinds = Counter(d["question_type"] for d in docs)
    assert len(kinds) >= 5 and len(set(kinds.values())) == 1
    for kind in kinds:
        answers = Counter(d["answer_text"] for d in docs if d["question_type"] == kind)
        even = sum(answers.values()) / len(CHOICES[kind])
        assert set(answers) == set(CHOICES[kind]) and all(even / 2 < n < 2 * even for n in answers.values())
    for kind in TASKS[task]:
        levels = Counter(d["difficulty"] for d in docs if f"-{kind}-" in d["id"])
        even = sum(levels.values()) / len(ASKED[kind])
        assert set(levels) == set(ASKED[kind]) and all(abs(n - even) < 0.15 * even for n in levels.values())


@pytest.mark.parametrize("task", TASKS)
def test_options_do_not_give_the_answer_away(task):
    """Always taking the word that is most often right on the tune split is no better than chance (a quarter)."""
    docs = task_docs(task, "test")
    right = np.mean(majority(task_docs(task, "tune"), docs))
    assert abs(right - 0.25) < 3 * np.sqrt(0.25 * 0.75 / len(docs))


LIMITS = {
    value
    for path in (params_folder() / "laptop").glob("*.yaml")
    for name, value in read_yaml(path).items()
    if name.endswith(("limit", "trace_samples")) and value
}


@pytest.mark.parametrize("split", builder.QUESTIONS)
@pytest.mark.parametrize("task", TASKS)
def test_every_limit_asks_each_kind_in_proportion(task, split):
    docs = task_docs(task, split)
    whole = Counter(doc["question_type"] for doc in docs)
    for limit in {*(min(limit, len(docs)) for limit in LIMITS), *range(1, len(docs), 7)}:
        part = Counter(doc["question_type"] for doc in docs[:limit])
        for kind, count in whole.items():
            assert abs(part[kind] - limit * count / len(docs)) <= 1
        levels = Counter(doc["difficulty"] for doc in docs[:limit])
        for level, count in Counter(doc["difficulty"] for doc in docs).items():
            assert abs(levels[level] - limit * count / len(docs)) <= len(whole)
    assert LIMITS


def test_answers_follow_from_what_the_clip_shows():
    for index in range(20):
        scene = sample_scene("tune", "needle", index)
        shown = token_objects(scene)
        assert scene.difficulty == ASKED["needle"][index % len(ASKED["needle"])]
        first = {}
        for border in BORDERS:
            needle = next(i for i, o in enumerate(scene.objects) if o.border == border)
            frames, rows, columns = np.nonzero(shown == needle)
            answers = {q.type: q.answer for q in questions(scene) if f" {border} border" in q.text}
            quarters = set((frames // 8).tolist())
            assert quarters == {CHOICES["needle_when"].index(answers["needle_when"])}
            assert len(set(frames.tolist())) == LEVELS[scene.difficulty].shown
            x, y = 16 * columns.mean() + 8, 16 * rows.mean() + 8
            nearest = min(PLACES, key=lambda p: np.hypot(PLACES[p][0] - x, PLACES[p][1] - y))
            assert nearest == answers["needle_place"] and scene.objects[needle].color == answers["needle_color"]
            first[answers["needle_color"]] = frames.min()
        asked = next(q for q in questions(scene) if q.type == "needle_first")
        assert asked.answer == min(first, key=first.__getitem__)

        scene = sample_scene("tune", "move", index)
        moved = {o.color: o.path[-1] - o.path[0] for o in scene.objects}
        for question in questions(scene):
            if question.type == "mover":
                assert question.answer == max(moved, key=lambda c: np.abs(moved[c]).max())
            else:
                dx, dy = next(m for c, m in moved.items() if f" {c} " in question.text)
                along = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
                assert question.answer == along

        scene = sample_scene("tune", "attributes", index)
        tokens = Counter(token_objects(scene, cell=2)[0].ravel().tolist())
        answers = {q.type: q.answer for q in questions(scene)}
        by_size = sorted((n, scene.objects[i].color) for i, n in tokens.items() if i >= 0)
        assert by_size[-1][1] == answers["largest"]
        assert len(by_size) == 2 + CHOICES["count"].index(answers["count"])

        scene = sample_scene("tune", "order", index)
        shown = token_objects(scene, cell=8)
        first = {o.color: int((shown == i).any((1, 2)).argmax()) for i, o in enumerate(scene.objects)}
        answers = {q.type: q.answer for q in questions(scene)}
        assert sorted(first, key=first.__getitem__) == [answers[k] for k in ("first", "second", "third", "last")]


def test_a_higher_level_is_harder_to_see():
    """Its objects stand out less from the background, and cover fewer pixels."""
    for kind in FRAMES:
        contrast, area = [], []
        for level in LEVELS:
            seen, covered = [], []
            for index in range(12):
                scene = sample_scene("tune", kind, index, level)
                shown = token_objects(scene, cell=4)[-1] if kind != "needle" else token_objects(scene, cell=4)[0]
                picture = render(scene)[-1 if kind != "needle" else 0].reshape(24, 4, 24, 4, 3).mean((1, 3))
                seen.append(np.abs(picture[shown >= 0].mean(0) - picture[shown < 0].mean(0)).max())
                covered.append((shown >= 0).sum() / len(np.unique(shown[shown >= 0])))
            contrast.append(np.mean(seen))
            area.append(np.mean(covered))
        assert contrast[0] > contrast[2] > contrast[4] and area[0] > area[2] > area[4]


def test_objects_are_a_small_part_of_the_picture():
    share = {
        kind: np.mean([(token_objects(sample_scene("tune", kind, i)) >= 0).mean() for i in range(30)])
        for kind in FRAMES
    }
    assert max(share.values()) < 0.35, (
        share
    )  # five of them at most, each of whose edges counts from an eighth of a token


def test_video_survives_the_codec(tmp_path):
    frames = render(sample_scene("tune", "needle", 0))
    write_video(tmp_path / "clip.mp4", frames)
    decoded = decode(tmp_path / "clip.mp4")
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 6


def test_a_clip_is_the_same_file_each_time(tmp_path):
    """Else another run, or another machine, would ask about other pictures."""
    for number in range(6):
        frames = render(sample_scene("test", "needle", number))
        for name in ("one.mp4", "other.mp4"):
            write_video(tmp_path / name, frames)
        assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "other.mp4").read_bytes()


def test_build_is_complete_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "QUESTIONS", {"tune": 30})
    docs = {task: load_docs(task, "tune", tmp_path) for task in TASKS}
    assert {len(d) for d in docs.values()} == {30}
    assert all(Path(d["video"]).is_file() for rows in docs.values() for d in rows)
    built = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert load_docs("needle", "tune", tmp_path) == docs["needle"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == built
    assert [p.name for p in tmp_path.iterdir()] == [builder.version()]  # nothing half-built stays


def test_tokenizer_round_trip():
    from training.tokenizer import FOOTER, HEADER, build_tokenizer

    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    doc = task_docs("needle", "tune")[0]
    for text in (HEADER + "<image>\n" + prompt(doc["question"], doc["options"]) + FOOTER, "Grüße, 世界!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert all(len(tokenizer.encode(f" {word}")) == 1 for words in CHOICES.values() for word in words)
    assert all(len(tokenizer.encode(letter)) == 1 for letter in LETTERS)
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]) == [
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ]
