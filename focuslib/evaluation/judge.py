"""MMBench's judge: a hosted language model that is asked where no letter can be read in an answer."""

from collections.abc import Iterator
from contextlib import contextmanager

NO_KEY = "YOUR_API_KEY"  # what the stock task sends where the user has set none
NO_ANSWER = "Failed to obtain answer via API"  # what the stock task goes on with after its retries


@contextmanager
def no_unanswered_calls() -> Iterator[None]:
    """Without a key (OPENAI_API_KEY or AZURE_API_KEY) the judge cannot answer: do not call it.

    The score is what the stock task gives after 45 seconds of retries a question: a seeded random letter counts.
    """
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator as Evaluator

    ask = Evaluator.get_chat_response

    def ask_with_key(self, *arguments, **settings):
        return NO_ANSWER if self.API_KEY == NO_KEY else ask(self, *arguments, **settings)

    Evaluator.get_chat_response = ask_with_key
    try:
        yield
    finally:
        Evaluator.get_chat_response = ask
