"""Decodes clips from video files, in a separate process that data.py starts and restarts.

    $ python support/decode.py

    stdin       requests: one JSON object per line, the arguments of read_clip
    stdout      for each request one line of JSON, then height * width * 3 bytes for each frame
                {"path", "size", "fps", "seconds", "start"}, or {"path", "reason"} without frames,
                with "temporary" if the system could not read the file, whose content may be good

    read_clip   opens a file, seeks, decodes -> the frames of a clip
    on_display  chooses the frames that a player would show at the clip's times
    picture     resizes, crops and rotates one frame
    serve       the loop over requests, with limits on time and memory

A damaged file can crash its decoder, hang it or exhaust the memory: this ends the process, not the training.
The file does not import torch, so a new process starts fast and stays small.
"""
import json
import resource
import signal
import sys
from itertools import chain, dropwhile, islice

import av
import numpy as np
from av.video.reformatter import Colorspace, ColorTrc, Interpolation

MAX_PIXELS = 8192 * 4352                            # per frame
MAX_DECODED = 5000                                  # frames decoded for one clip
MAX_MEMORY = 4 * 2**30                              # bytes per process
TIMEOUT = 30                                        # seconds per clip
TOLERANCE = 2e-3                                    # seconds: some containers round times to milliseconds
# The list has no playlists or scripts, because these can open other files.
SAFE = {"protocol_whitelist": "file", "format_whitelist": "mov,matroska,avi,mpeg,mpegts,flv,asf,gif"}


class BadVideo(Exception):
    """A file that cannot be used. The message becomes the reason in the skip list."""


def read_clip(path, start, num_frames, width, height, fps, early=0.0):
    """The clip of `num_frames` frames at `fps` -> (uint8 [f height width 3], facts).

    start: 0 to 1, the position of the clip between the first and the last possible one. If decoding from that
    position fails, it begins `early` = 2 seconds before it; if this fails too, the clip is the beginning of
    the file. Raises BadVideo.
    """
    span = (num_frames - 1) / fps
    try:
        with av.open(f"file:{path}", options=SAFE, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise BadVideo("no video that can be decoded")
            codec = stream.codec_context
            codec.thread_count = 1                          # other processes use the other cores
            codec.options = {"err_detect": "explode"}       # do not guess missing pixels
            seconds = float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / 1e6
            # AVI and ASF store decoding times only: FFmpeg's presentation times are guesses, see on_display.
            by_dts = container.format.name in ("avi", "asf")
            begin, offset = None, start * (seconds - span - 2 * TOLERANCE)
            if offset > 0:
                first = next(container.decode(stream)).dts if by_dts else stream.start_time
                begin = offset + float((first or 0) * stream.time_base)
                container.seek(int((begin - early) / stream.time_base), stream=stream)  # to a key frame
            # Some demuxers seek to other frames too. What is decoded before a key frame is damaged.
            decoded = dropwhile(lambda f: not f.key_frame, islice(container.decode(stream), MAX_DECODED))
            aspect = float(stream.sample_aspect_ratio or 1)
            # No camera has pixels of other aspects: such a header is damaged.
            frames = [picture(frame, aspect if 1 / 3 <= aspect <= 3 else 1, width, height)
                      for frame in on_display(decoded, by_dts, begin, num_frames, fps)]
            if len(frames) < num_frames:
                raise BadVideo(f"{len(frames)} frames of {num_frames}: shorter than {span:.2f} seconds")
            rate = round(float(stream.average_rate or 0), 3)
            return np.stack(frames), {"size": [codec.width, codec.height], "fps": rate,
                                      "seconds": round(seconds, 3), "start": round(max(0.0, offset), 3)}
    except (av.FFmpegError, BadVideo, StopIteration) as error:
        if start > 0 and early == 0:
            return read_clip(path, start, num_frames, width, height, fps, early=2.0)
        if start > 0:
            return read_clip(path, 0.0, num_frames, width, height, fps)
        raise BadVideo(getattr(error, "strerror", None) or error) from error


def on_display(frames, by_dts, begin, num_frames, fps):
    """Yields the frames that a player shows at the times begin, begin + 1 / fps, ...: at each time, the last
    frame presented until then, for constant and variable rates. begin = None is the first frame's time.

    by_dts: uses decoding times, for files without presentation times; FFmpeg's guesses are wrong where there
    are B-frames. Decoding times are late by a constant, but in order. The last frames have none: each begins
    where the one before it ends."""
    held, i = None, 0
    for frame in chain(frames, [None]):
        if frame is not None and by_dts:
            frame.pts = held.pts + held.duration if held and frame.dts is None else frame.dts
        if frame is not None and (frame.time is None or held is not None and frame.time < held.time):
            raise BadVideo("frames without a time, or times that run backwards")
        if held is not None:
            until = frame.time if frame else held.time + max(held.duration * held.time_base, 2 * TOLERANCE)
            while i < num_frames and begin + i / fps < until - TOLERANCE:
                yield held
                i += 1
        if i == num_frames or frame is None:
            return
        if begin is None:
            begin = frame.time
        elif held is None and frame.time > begin + TOLERANCE:
            raise BadVideo("seeking leads to a later time than requested")
        held = frame


def picture(frame, aspect, width, height):
    """A frame -> uint8 [height width 3]: resized, with antialiasing, to cover that size, cropped around its
    centre, mirrored and rotated as the display matrix says. aspect: width / height of a stored pixel."""
    turns = round(frame.rotation / 90) % 4
    width, height = (height, width) if turns % 2 else (width, height)   # the size before rotation
    # Front cameras write a display matrix that also mirrors: its determinant is negative.
    matrix = np.frombuffer(frame.side_data.get("DISPLAYMATRIX") or np.eye(3, dtype=np.int32), np.int32)
    step = -1 if np.linalg.det(matrix.reshape(3, 3)) < 0 else 1         # through the rows, before rotation
    scale = max(width / (frame.width * aspect), height / frame.height)
    w, h = max(width, round(frame.width * aspect * scale)), max(height, round(frame.height * scale))
    if frame.is_corrupt or max(w * h, frame.width * frame.height) > MAX_PIXELS:
        raise BadVideo("a damaged frame" if frame.is_corrupt else f"{frame.width}x{frame.height}: too large")
    if frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):      # needs tone mapping
        raise BadVideo(f"HDR video ({ColorTrc(frame.color_trc).name}): convert it to SDR")
    # A frame of 720 or more lines whose colour space is unspecified (2) is in BT.709, as players assume.
    # Without FULL_CHR_H_INT, video with subsampled colour becomes up to 3 levels too dark, and blurred.
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    how = dict(src_colorspace=Colorspace.ITU709 if frame.colorspace == 2 and frame.height >= 720 else None,
               interpolation=flags, format="rgb24", threads=1)
    if frame.interlaced_frame:                      # odd lines show a later time: keep the even ones
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.to_ndarray(**how)[::2]))
    top, left = (h - height) // 2, (w - width) // 2
    pixels = frame.to_ndarray(width=w, height=h, **how)[top:top + height, left:left + width]
    return np.rot90(pixels[::step], turns)


def serve():
    """Answers requests until stdin is closed."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # the end of the training is no error of this process
    for request in map(json.loads, sys.stdin.buffer):
        signal.alarm(TIMEOUT)                                           # then SIGALRM ends the process
        try:
            frames, facts = read_clip(**request)
        except Exception as error:
            frames, facts = b"", {"reason": str(error) if isinstance(error, BadVideo) else repr(error)}
            # FFmpeg reports some damaged files as EPERM (1). A file without permission is EACCES.
            if isinstance(cause := error.__cause__ or error, OSError) and cause.errno != 1:
                facts["temporary"] = True
        signal.alarm(0)
        facts = json.dumps({"path": request["path"], **facts})
        sys.stdout.buffer.write(facts.encode() + b"\n" + bytes(frames))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
