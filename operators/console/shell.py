"""The shell: statements as they are typed, each query and each INSERT a job of its own.

What was defined is kept as statements and said again to each job, so that no job knows of another. An INSERT keeps its
state below ``--state`` under the name of its sink; typed again, also in a later shell, it goes on from its checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from datafusion import SessionContext
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.lexers import PygmentsLexer

from operators.console.running import SqlSettings, run_answers
from operators.context import StreamContext
from operators.errors import OperatorError
from operators.exit_codes import ExitCode
from operators.sql.names import BOUND_FUNCTIONS, WINDOW_FUNCTIONS
from operators.sql.statements import SqlLexer, is_complete, split_script
from statebackend import StateStoreError

__all__ = ["Shell", "run_shell"]

_PROMPT, _CONTINUED = "sql> ", "...> "
_LEAVE = frozenset({"\\q", "quit", "exit"})
_HELP = """\
A statement ends with a semicolon and may have several lines: CREATE EXTERNAL TABLE, CREATE VIEW, DROP, SHOW TABLES,
DESCRIBE, SELECT, INSERT INTO, COPY, EXPLAIN. Ctrl-C stops what runs, or forgets what is typed; \\q or Ctrl-D leaves.
"""
_WORDS = (
    *("AND", "AS", "ASC", "BETWEEN", "BY", "CASE", "CAST", "COPY", "CREATE"),
    *("CROSS", "DESC", "DESCRIBE", "DISTINCT", "DROP", "ELSE", "END", "EXCEPT", "EXPLAIN"),
    *("EXTERNAL", "FILTER", "FROM", "FULL", "GROUP", "GROUPING", "HAVING", "IN", "INNER"),
    *("INSERT", "INTERVAL", "INTO", "IS", "JOIN", "LATERAL", "LEFT", "LIKE", "LOCATION"),
    *("NOT", "NULL", "ON", "OPTIONS", "OR", "ORDER", "OUTER", "OVER", "PARTITION"),
    *("PARTITIONED", "REPLACE", "RIGHT", "ROLLUP", "SELECT", "SETS", "SHOW", "STORED", "TABLE"),
    *("TABLES", "THEN", "UNION", "USING", "VALUES", "VIEW", "WHEN", "WHERE", "WITH"),
    *("PARQUET", "CSV", "event_time", "watermark_delay", "mode", "bounded", "static", "sink"),
)


def run_shell(settings: SqlSettings) -> ExitCode:
    """A shell on the terminal, until the user leaves it."""
    shell = Shell(settings)
    session: PromptSession[str] = PromptSession(
        history=_history(),
        lexer=PygmentsLexer(SqlLexer),
        completer=_Completer(shell.words),
        complete_while_typing=False,
        multiline=Condition(lambda: not is_ended(get_app().current_buffer.text)),
        prompt_continuation=lambda width, *_: _CONTINUED.rjust(width),
    )
    sys.stdout.write(_HELP)
    while True:
        try:
            typed = session.prompt(_PROMPT)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return ExitCode.DONE
        if typed.strip().rstrip(";").lower() in _LEAVE:
            return ExitCode.DONE
        shell.run(typed)


def is_ended(typed: str) -> bool:
    """Whether Enter ends what is typed: a statement with its semicolon, or a word for the shell itself."""
    return typed.strip().lower() in _LEAVE or is_complete(typed)


class Shell:
    """Runs what is typed; it never raises for a statement that fails, but tells of it on standard error."""

    def __init__(self, settings: SqlSettings) -> None:
        self._settings = settings
        self._definitions: dict[str, str] = {}
        self._columns: set[str] = set()
        self._functions = _functions()

    def run(self, typed: str) -> None:
        """Run statements one after the other; one that fails ends that."""
        for statement in split_script(typed):
            try:
                self._run(statement.text)
            except (OperatorError, StateStoreError, OSError, ValueError) as error:
                sys.stderr.write(f"error: {type(error).__name__}: {error}\n")
                return
            except KeyboardInterrupt:
                sys.stderr.write("aborted\n")
                return

    def words(self) -> Iterator[str]:
        """What may be meant where a word is begun."""
        yield from self._definitions
        yield from sorted(self._columns)
        yield from _WORDS
        yield from self._functions

    def _run(self, statement: str) -> None:
        context = self._context(None)
        answers = context.execute(statement)
        settings = replace(self._settings, state=None)
        if answers or not context.graph.sinks:
            self._definitions = dict(context.definitions)
            self._columns |= set(context.columns)
        elif self._settings.state is not None:
            settings = replace(settings, state=f"{self._settings.state}/{context.graph.sinks[0].operator_id}")
            context = self._context(settings.state)
            answers = context.execute(statement)
        run_answers(context, answers, settings)

    def _context(self, state: str | None) -> StreamContext:
        """A job that knows what was defined."""
        context = self._settings.context(state)
        context.execute(";\n".join(self._definitions.values()))
        return context


def _functions() -> list[str]:
    session = SessionContext()
    return sorted({*session.udfs(), *session.udafs(), *session.udwfs(), *WINDOW_FUNCTIONS, *BOUND_FUNCTIONS})


class _Completer(Completer):
    def __init__(self, words: Callable[[], Iterable[str]]) -> None:
        self._words = words

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:  # noqa: ARG002
        begun = document.get_word_before_cursor()
        if begun:
            for word in dict.fromkeys(self._words()):
                if word.lower().startswith(begun.lower()):
                    yield Completion(word, start_position=-len(begun))


def _history() -> History:
    """What was typed in earlier shells; nothing where that cannot be kept."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(home) / "datafusion-statebackend" / "sql_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
