"""Every code a report may hold: what it means and what to do. docs/data.md shows this table."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["problem", "warning"]


@dataclass(frozen=True)
class Code:
    """A problem makes the file invalid; a warning does not, though it may say that a row is left out."""

    severity: Severity
    meaning: str
    cure: str


def _problem(meaning: str, cure: str) -> Code:
    return Code("problem", meaning, cure)


def _warning(meaning: str, cure: str) -> Code:
    return Code("warning", meaning, cure)


CODES: dict[str, Code] = {
    # the file
    "file_empty": _problem("the file holds no rows", "write one JSON object per line"),
    "file_damaged": _problem("storage has lost or changed the file", "upload it again; tell the operator if that does not help"),
    "file_binary": _problem("the file is no text: an archive, a table, a picture", "unpack it, or write it as JSON Lines"),
    "file_untrainable": _problem("every row is one that nothing can be learnt from", "give each row an answer to train on"),
    "formats_mixed": _problem("rows of several formats in one file", "keep one format per file"),
    "limits_exceeded": _problem("reading the file took more memory or time than is allowed", "split it into smaller files"),
    # a line
    "not_utf8": _problem("bytes that are not UTF-8", "save the file as UTF-8"),
    "line_too_long": _problem("a line over 1 MiB", "split the conversation into several rows"),
    "not_json": _problem("a line that is not one JSON value", "write each row as one JSON object on a line of its own"),
    "duplicate_key": _problem("a key that stands twice in one object", "keep one of the two"),
    "too_deep": _problem("objects or lists nested deeper than 32 levels", "flatten the row"),
    "nul_character": _problem("a text that holds a NUL character", "remove it"),
    "lone_surrogate": _problem("a text that holds half of a surrogate pair", "write the whole character"),
    # a row
    "row_not_object": _problem("a row that is no JSON object", "write each row as one JSON object on a line of its own"),
    "format_unknown": _problem("a row whose keys belong to no format", "use the keys of one of the formats in docs/data.md"),
    "unknown_key": _problem("a key that this format does not have", "remove it, or correct its name"),
    "field_missing": _problem("a key that this format requires is missing", "add it"),
    "field_not_text": _problem("a field that must be text is not", "write it as a string"),
    "field_empty": _problem("a field that must not be empty is", "fill it in, or remove the row"),
    # messages
    "messages_missing": _problem("no list of at least one message", "write the conversation as a list of messages"),
    "message_not_object": _problem("a message that is no JSON object", "write `role` and `content` of each message"),
    "role_unknown": _problem("a role that does not exist", "use one of the roles of the format"),
    "content_not_text": _problem("content that is neither text nor a list of text parts", "write it as a string"),
    "content_empty": _problem("an answer to train on that is empty", "write the answer, or give it weight 0"),
    "part_unsupported": _problem("an image, sound or file in a message", "remove it: only text is trained on"),
    "weight_invalid": _problem("a weight that is neither 0 nor 1", "write 0 (context only) or 1 (trained on)"),
    "weight_misplaced": _problem("a weight on a message that is not the assistant's", "remove it"),
    "key_misplaced": _problem("a key on a message whose role does not have it", "move it to the message it belongs to"),
    "name_invalid": _problem("a name that is no short text", "write it as a string of at most 64 characters, or remove it"),
    "assistant_missing": _problem("a conversation without an answer", "add an assistant message"),
    "output_invalid": _problem("an answer to compare that is not one assistant message", "write a list of one assistant message"),
    "label_invalid": _problem("a label that is neither true nor false", "write true for a good answer, false for a bad one"),
    "rating_misplaced": _problem(
        "a rated conversation that does not end with an answer", "end with the answer that the label rates"
    ),
    # tools
    "tools_invalid": _problem("a tool that is no function of the API's form", "describe it as the API does: docs/data.md"),
    "tool_calls_invalid": _problem("a tool call without id, name or arguments", "write it as the API's answers do: docs/data.md"),
    "arguments_invalid": _problem("arguments that are no JSON object", "write them as one JSON object, or as its text"),
    "tool_call_unanswered": _problem(
        "a tool call that the messages after it do not answer", "add its tool message, or end there"
    ),
    "tool_call_unknown": _problem("a tool message that answers no open call", "give it the id of a call in the message before"),
    "function_deprecated": _problem("the API's older `functions` and `function_call`", "write `tools` and `tool_calls`"),
    # warnings of the first pass
    "duplicate_row": _warning("the same row again", "keep one, unless it is meant to count twice"),
    "special_token": _warning(
        "a model's control token written as text", "reword it: bases that have the token leave the row out"
    ),
    "nothing_to_train": _warning("a row whose answers all have weight 0", "remove it: it is left out"),
    "system_empty": _warning("a system message without text", "remove the message, or fill it in"),
    "user_empty": _warning("a user message without text", "fill it in, or remove the message"),
    "same_role_twice": _warning("two messages of one role in a row", "join them: some bases leave such rows out"),
    "starts_with_assistant": _warning("a conversation that starts with an answer", "begin with what it answers"),
    "last_not_assistant": _warning("messages after the last answer", "remove them: nothing is learnt from them"),
    "row_long": _warning("a row over 32 KiB: more than 4,096 tokens in most languages", "split it, or raise max_seq_length"),
    "key_ignored": _warning("a column that this format does not have", "nothing, if it is not meant for training"),
    "name_ignored": _warning("the name of a speaker, which no base is shown", "write it into the content if it matters"),
    "tool_not_listed": _warning("a call of a function that the row's `tools` do not list", "list the function in `tools`"),
    "parallel_calls": _warning("several calls at once though parallel_tool_calls is false", "make one call per message"),
    "outputs_equal": _warning("a preferred answer that equals the other one", "remove the row: it prefers nothing"),
    # warnings of a base and its settings, when a job is prepared or a file is checked for a base
    "row_not_rendered": _warning("a row that the base's chat template cannot show", "change it, or choose another base"),
    "row_too_long": _warning("a row longer than max_seq_length: it is left out", "raise it, or set long_rows to truncate"),
    "row_truncated": _warning("a row whose beginning is cut away", "nothing, if the end is what matters"),
    # rows of evaluation files
    "item_invalid": _problem("an `item` that is no object, or an empty one", "write its fields as one JSON object"),
    "reference_missing": _problem("a chat that does not end with an answer", "end with the answer that models are held to"),
    "choices_invalid": _problem("choices that are no list of 2 to 26 texts", "write each choice as a string"),
    "answer_invalid": _problem("an answer that is none of the choices", "write its index from 0, or its letter"),
    "tools_not_evaluated": _problem("a chat with tools, which answers are asked for without", "remove the row"),
}
