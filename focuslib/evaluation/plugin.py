"""The entry point by which lmms-eval finds our model class: `lmms-eval --model focuslib`."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="focuslib", simple_class_path="focuslib.evaluation.lmms.FocusLmms")
