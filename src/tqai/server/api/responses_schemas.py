"""What /v1/responses takes and returns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tqai.server.api.schemas import MAX_LOGPROBS, Body, NamedFunction, Text

__all__ = ["ResponseBody", "ResponsesRequest"]


class InputText(Body):
    """A piece of text, of the user or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Body):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[InputText]
    id: str | None = None
    status: str | None = None


class FunctionCallItem(Body):
    """A function call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: Text
    id: str | None = None
    status: str | None = None


class FunctionOutputItem(Body):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text
    id: str | None = None
    status: str | None = None


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenTool(NamedFunction):
    """A tool that must be called."""

    type: Literal["function"]


class TextFormat(Body):
    """What the output must look like."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_one_is_used(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema: needed with type json_schema, and only there")
        return self


class TextSettings(Body):
    """Settings of the output's text."""

    format: TextFormat | None = None


class ResponsesRequest(Body):
    """Body of /v1/responses."""

    model: Annotated[str, Field(max_length=512)]
    input: (
        Text
        | Annotated[
            list[InputMessage | FunctionCallItem | FunctionOutputItem], Field(min_length=1, max_length=4096)
        ]
    )
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=1 << 30)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    text: TextSettings | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: Literal[True] | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    user: str | None = None


class ResponseBody(BaseModel):
    """Answer of /v1/responses."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
