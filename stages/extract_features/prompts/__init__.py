"""Where a clip's prompt comes from: the dataset, words, or the picture itself."""

from stages.extract_features.prompts.chooser import PromptChooser, check_prompt, usable_sources
from stages.extract_features.prompts.prompt import ChosenPrompt

__all__ = ["ChosenPrompt", "PromptChooser", "check_prompt", "usable_sources"]
