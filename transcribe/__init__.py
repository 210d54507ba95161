"""Distributed batch transcription of audio archives."""
