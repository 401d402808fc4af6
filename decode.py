"""From a video file to the frames of a clip, in a process that may die.

    $ python decode.py          # stdin: requests, a line of JSON each; stdout: facts, a line too, and pixels

What a file does to its decoder, crash it, hang it or take all memory, ends with this process; data.py starts
another. It does not import torch, so that takes no time and little memory.
"""
import json
import resource
import signal
import sys
from itertools import chain, islice

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation

MAX_PIXELS, MAX_DECODED = 8192 * 4352, 5000         # of a frame; frames decoded for one clip
MAX_MEMORY, TIMEOUT = 4 * 2**30, 30                 # bytes of a decoding process, seconds for one clip
TOLERANCE = 2e-3                                    # seconds: some containers round times to milliseconds
# Only formats that hold their video themselves: no playlists or scripts, which name other files.
SAFE = {"protocol_whitelist": "file", "format_whitelist": "mov,matroska,avi,mpeg,mpegts,flv,asf,gif"}


class BadVideo(Exception):
    """A file that cannot be used. The message is the reason in the skip list."""


def read_clip(path, start, num_frames, width, height, fps, early=0.0):
    """`num_frames` pictures at `fps`, as a player would show them -> (uint8 [f height width 3], facts).

    `start`, 0 to 1, is where the clip begins, from the first moment to the last possible one. Where that does
    not work, even if decoding begins `early` seconds before, the clip is the beginning of the file. Raises
    BadVideo if that is bad, too.
    """
    span = (num_frames - 1) / fps
    try:
        with av.open(f"file:{path}", options=SAFE, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise BadVideo("no video that can be decoded")
            stream.codec_context.thread_count = 1                       # other cores have clips of their own
            stream.codec_context.options = {"err_detect": "explode"}    # rather than guess what is missing
            seconds = float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / 1e6
            begin, offset = None, start * (seconds - span - 2 * TOLERANCE)
            if offset > 0:
                begin = offset + float((stream.start_time or 0) * stream.time_base)
                container.seek(int((begin - early) / stream.time_base), stream=stream)  # a key frame before
            frames = on_display(islice(container.decode(stream), MAX_DECODED), begin, num_frames, fps)
            aspect = float(stream.sample_aspect_ratio or 1)             # of a pixel: width over height
            pixels = [picture(frame, aspect, width, height) for frame in frames]
            if len(pixels) < num_frames:
                raise BadVideo(f"{len(pixels)} frames of {num_frames}: shorter than {span:.2f} seconds")
            return np.stack(pixels), {
                "size": [stream.codec_context.width, stream.codec_context.height],
                "fps": round(float(stream.average_rate or 0), 3), "seconds": round(seconds, 3),
                "start": round(max(0.0, offset), 3)}
    except (av.FFmpegError, BadVideo) as error:
        if start > 0:
            start, early = (start, 2.0) if early == 0 else (0.0, 0.0)
            return read_clip(path, start, num_frames, width, height, fps, early)
        raise BadVideo(getattr(error, "strerror", None) or error) from error


def on_display(frames, begin, num_frames, fps):
    """Yields the frame on display at begin, begin + 1 / fps, ..: the last one presented until then, whatever
    the file's rate, constant or not. begin: None is the first frame's time. Needs one frame beyond."""
    held, i = None, 0
    for frame in chain(frames, [None]):
        if frame is not None and frame.time is None:
            raise BadVideo("frames without a time")
        if held is not None:
            lasts = max(float(held.duration * held.time_base), 2 * TOLERANCE)
            until = frame.time if frame else held.time + lasts
            while i < num_frames and begin + i / fps < until - TOLERANCE:
                yield held
                i += 1
        if i == num_frames or frame is None:
            return
        if begin is None:
            begin = frame.time
        elif held is None and frame.time > begin + TOLERANCE:
            raise BadVideo("seeking leads to a later time than was asked for")
        held = frame


def picture(frame, aspect, width, height):
    """frame, its pixels `aspect` times as wide as high -> uint8 [height width 3]: resized with antialiasing
    until it covers that, the middle cut out, turned upright."""
    turns = round(frame.rotation / 90) % 4
    if turns % 2:
        width, height = height, width                                   # as stored
    scale = max(width / (frame.width * aspect), height / frame.height)
    w, h = max(width, round(frame.width * aspect * scale)), max(height, round(frame.height * scale))
    if frame.is_corrupt or max(w * h, frame.width * frame.height) > MAX_PIXELS:
        raise BadVideo("a damaged frame" if frame.is_corrupt else f"frames of {frame.width}x{frame.height}")
    # Colours without a label (2) are by custom those of HD from 720 lines on.
    how = dict(src_colorspace=Colorspace.ITU709 if frame.colorspace == 2 and frame.height >= 720 else None,
               interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND, format="rgb24", threads=1)
    if frame.interlaced_frame:                      # two moments, line by line: keep the lines of the first
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.to_ndarray(**how)[::2]))
    top, left = (h - height) // 2, (w - width) // 2
    pixels = frame.to_ndarray(width=w, height=h, **how)[top:top + height, left:left + width]
    return np.rot90(pixels, turns)


def serve():
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    for request in map(json.loads, sys.stdin.buffer):
        signal.alarm(TIMEOUT)                                           # ends the process
        try:
            pixels, facts = read_clip(**request)
        except Exception as error:
            reason = str(error) if isinstance(error, BadVideo) else repr(error)
            pixels, facts = np.empty(0), {"reason": reason}
        signal.alarm(0)
        reply = json.dumps({"path": request["path"], **facts}).encode() + b"\n"
        sys.stdout.buffer.write(reply + pixels.tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
