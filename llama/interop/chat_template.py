"""A checkpoint's own chat template, run: a program in Jinja, from a stranger, so it runs in a sandbox.

transformers stores the format of a dialog as such a program. It is given the messages and the texts of bos and eos and
writes one text, in which the special tokens stand for themselves
(https://huggingface.co/docs/transformers/chat_templating).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 10_000_000
"""Characters that a template may write."""


class ChatTemplate:
    """The ids of a dialog, up to where the answer begins, by a template."""

    def __init__(self, template: str, model: Any, name: str) -> None:
        """`model` encodes the text; `name` is for messages. The template is compiled when it is first needed."""
        self.template, self._model, self._name = template, model, name
        self._compiled: Any = None

    def text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What the template writes. ValueError for a template that fails, or that refuses the dialog."""
        import jinja2

        model = self._model
        special = {name: model.id_to_piece(i) if i >= 0 else "" for name, i in self._ids().items()}
        try:
            compiled = self._compile()
            found: str = compiled.render(messages=[dict(m) for m in messages], add_generation_prompt=True, **special)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self._name} refuses the dialog, or fails: {error}") from error
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"{self._name} fails ({type(error).__name__}: {error}): pass another checkpoint"
            ) from error
        if len(found) > LONGEST:
            raise ValueError(
                f"{self._name} writes {len(found):,} characters; {LONGEST:,} are allowed: shorten the dialog"
            )
        return found

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of the text. ValueError also where a message contains a special token's text."""
        for message in messages:
            content = str(message.get("content", ""))
            inside = [i for i in self._model.encode_marked(content) if self._model.is_control(i)]
            if inside:
                raise ValueError(
                    f"a message contains the special token {self._model.id_to_piece(inside[0])!r}, which would end or "
                    "begin a message: take it out, or write it in another way"
                )
        ids: list[int] = self._model.encode_marked(self.text(messages))
        return ids

    def _ids(self) -> dict[str, int]:
        return {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}

    def _compile(self) -> Any:
        if self._compiled is None:
            try:
                from jinja2.sandbox import ImmutableSandboxedEnvironment
            except ImportError:
                raise ValueError("a chat template needs a package: pip install 'codellama[hf]'") from None
            extensions = ["jinja2.ext.loopcontrols"]
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
            environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
            environment.globals["raise_exception"] = _refuse
            environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
            self._compiled = environment.from_string(self.template)
        return self._compiled


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
