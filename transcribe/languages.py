"""Facts about languages that several steps share. Pure data."""

from __future__ import annotations

# Whisper's published language codes (openai/whisper, tokenizer.py: LANGUAGES); the
# checkpoint has the last word, this list only catches typing errors before a run starts.
LANGUAGES = frozenset(
    "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th"
    " ur hr bg lt la mi ml cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr"
    " pa si km sn yo so af oc ka be tg sd gu am yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt"
    " haw ln ha ba jw su yue".split()
)

# Written without blanks between words: a word is a character here.
UNSPACED_LANGUAGES = frozenset("zh yue ja th lo my km".split())
