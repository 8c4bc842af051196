"""Sources of a clip's prompt: the dataset, text (Grounding DINO), or motion in the video."""

from stages.extract_features.prompts.chooser import PromptChooser, check_prompt, usable_sources
from stages.extract_features.prompts.prompt import ChosenPrompt, convert_prompt

__all__ = ["ChosenPrompt", "PromptChooser", "check_prompt", "convert_prompt", "usable_sources"]
