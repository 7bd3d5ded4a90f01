"""HH transcripts as pairs, for tests."""

from preftune.data import Preference
from preftune.data.hh import parse_transcript, split_turns


def split_pair(chosen: str, rejected: str, *, normalize: bool = True) -> Preference:
    """Two transcripts, split at their last assistant turn (`split_turns`)."""
    return split_turns(parse_transcript(chosen), parse_transcript(rejected), normalize=normalize)
