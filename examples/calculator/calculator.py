"""A calculator that the model may use while it writes: two rollout functions (docs/rollout_functions.md).

    --rollout-function calculator:tags           <calc>12*7</calc> is answered with <result>84</result>
    --rollout-function calculator:worked_sums    12*7= is continued with 84: the notation of the quickstart's model

with this folder on PYTHONPATH.
"""

import ast
import operator
import re
from fractions import Fraction

from megatron_fipo.rollout.dialogue import Dialogue

LONGEST = 100  # characters of an expression
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


async def tags(dialogue: Dialogue) -> None:
    """For models that write words: tell them of the tags in the prompt (--problem-template)."""
    turn = await dialogue.generate(stop=["</calc>"])
    while turn.finish_reason == "string":
        expression = turn.text.partition("</calc>")[0].rpartition("<calc>")[2]
        dialogue.insert(f"<result>{calculate(expression) or 'error'}</result>")
        turn = await dialogue.generate(stop=["</calc>"])


async def worked_sums(dialogue: Dialogue) -> None:
    """For the quickstart's model, which works out 7+1-3= as 7+1=8;8-3=5: what follows its = is the calculator's."""
    turn = await dialogue.generate(stop=["="])
    while turn.finish_reason == "string":
        expression = re.search(r"[^;=]*$", turn.text.removesuffix("="))
        dialogue.insert(calculate(expression[0]) or "")  # without a result it goes on by itself
        turn = await dialogue.generate(stop=["="])


def calculate(expression: str) -> str | None:
    """The exact value of ``+ - * /`` and parentheses over numbers; None if it is anything else, or has none.

    A model wrote it: it is parsed, and walked through node by node; nothing of it is ever executed.
    """
    if len(expression) > LONGEST:
        return None
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(value) if value.denominator == 1 else f"{float(value):.10g}"
    except (SyntaxError, ValueError, ArithmeticError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    raise ValueError(f"no arithmetic: {ast.dump(node)}")
