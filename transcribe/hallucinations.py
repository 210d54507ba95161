"""Sentences that Whisper writes where nobody speaks.

Whisper was trained on subtitles, and over noise, music or a breath it writes what subtitles
say there: credits, thanks, goodbyes. Owns the list, by language, and when a match counts. Pure.
"""

from __future__ import annotations

import re
import unicodedata

from transcribe.engines.base import Hypothesis

# Credits and channel talk: nobody says this alone on a recorded call.
_SUBTITLE_TALK = {
    "en": (
        "thanks for watching",
        "thank you for watching",
        "thank you so much for watching",
        "thanks for watching and see you next time",
        "please subscribe",
        "please subscribe to my channel",
        "like and subscribe",
        "don't forget to like and subscribe",
        "subtitles by the amara org community",
        "subtitles by steamteamextra",
        "transcription by castingwords",
        "transcribed by https otter ai",
        "translated by",
        "see you in the next video",
    ),
    "de": (
        "untertitel der amara org community",
        "untertitel im auftrag des zdf",
        "untertitel im auftrag des zdf für funk",
        "untertitelung des zdf",
        "untertitelung aufgrund der amara org community",
        "untertitel von stephanie geiges",
        "copyright wdr",
        "swr",
        "vielen dank fürs zuschauen",
        "danke fürs zuschauen",
        "bis zum nächsten mal",
    ),
    "es": (
        "subtítulos realizados por la comunidad de amara org",
        "subtítulos por la comunidad de amara org",
        "subtítulos en español de amara org",
        "gracias por ver el video",
        "gracias por ver el vídeo",
        "suscríbete",
        "suscríbete al canal",
        "no olvides suscribirte",
    ),
    "fr": (
        "sous titres réalisés par la communauté d'amara org",
        "sous titres réalisés para la communauté d'amara org",
        "sous titres par la communauté d'amara org",
        "sous titrage st' 501",
        "sous titrage société radio canada",
        "merci d'avoir regardé cette vidéo",
        "merci d'avoir regardé",
        "abonnez vous",
    ),
    "it": (
        "sottotitoli creati dalla comunità amara org",
        "sottotitoli e revisione a cura di qtss",
        "sottotitoli a cura di qtss",
        "grazie per aver guardato il video",
        "iscriviti al canale",
    ),
    "pt": (
        "legendas pela comunidade amara org",
        "legendas pela comunidade das amara org",
        "obrigado por assistir",
        "inscreva se no canal",
    ),
    "nl": (
        "ondertitels ingediend door de amara org gemeenschap",
        "ondertiteld door de amara org gemeenschap",
        "ondertiteling door de amara org gemeenschap",
        "bedankt voor het kijken",
        "tv gelderland 2021",
    ),
    "ru": (
        "продолжение следует",
        "субтитры сделал dimatorzok",
        "субтитры создавал dimatorzok",
        "редактор субтитров а семкин корректор а егорова",
        "спасибо за просмотр",
        "подписывайтесь на канал",
    ),
    "pl": (
        "napisy stworzone przez społeczność amara org",
        "dziękuję za oglądanie",
    ),
    "tr": ("altyazı m k", "izlediğiniz için teşekkür ederim", "abone ol"),
    "zh": (
        "谢谢观看",
        "謝謝觀看",
        "感谢观看",
        "字幕由amara org社区提供",
        "字幕由amara org社群提供",
        "请不吝点赞订阅转发打赏支持明镜与点点栏目",
        "請不吝點贊訂閱轉發打賞支持明鏡與點點欄目",
    ),
    "ja": (
        "ご視聴ありがとうございました",
        "ご清聴ありがとうございました",
        "最後までご視聴いただきありがとうございます",
        "チャンネル登録をお願いします",
    ),
    "ko": ("시청해주셔서 감사합니다", "구독과 좋아요 부탁드립니다", "다음 영상에서 만나요"),
}

# Said on calls too: it counts only where the engine itself doubts that there is speech.
_SMALL_TALK = {
    "en": ("you", "thank you", "thanks", "bye", "bye bye", "okay", "oh", "so", "i'm sorry"),
    "de": ("vielen dank", "danke", "tschüss", "ja"),
    "es": ("gracias", "adiós", "chao"),
    "fr": ("merci", "au revoir"),
    "it": ("grazie", "ciao"),
    "pt": ("obrigado", "tchau"),
    "nl": ("bedankt", "dank u wel", "ja"),
    "ru": ("спасибо", "пока"),
    "pl": ("dziękuję",),
    "tr": ("teşekkürler",),
    "zh": ("谢谢", "謝謝"),
    "ja": ("ありがとうございました", "おやすみなさい"),
    "ko": ("감사합니다", "네"),
}
_DOUBT_NO_SPEECH_PROB = 0.4
_DOUBT_LOGPROB = -0.8


def is_known_hallucination(text: str, hypothesis: Hypothesis) -> bool:
    """Whether a segment says nothing but a sentence known to be made up.

    Args:
        text: the segment's text.
        hypothesis: what it is a part of; small talk counts only if this one is doubtful. A
            model that tells no language, as CTC models do, does not write such sentences.
    """
    language = hypothesis.language
    if language is None:
        return False
    said = _plain(text)
    if said in _SUBTITLE_TALK.get(language, ()) or said in _SUBTITLE_TALK["en"]:
        return True
    is_doubtful = (
        hypothesis.no_speech_prob > _DOUBT_NO_SPEECH_PROB or hypothesis.avg_logprob < _DOUBT_LOGPROB
    )
    return is_doubtful and said in _SMALL_TALK.get(language, ())


def _plain(text: str) -> str:
    """Lower case, without punctuation but the apostrophe, blanks single."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    return " ".join(re.sub(r"[^\w' ]", " ", text).split())
