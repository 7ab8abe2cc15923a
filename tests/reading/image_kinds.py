"""Images of kinds that Pillow does not write: 16 bits a channel, and a colour profile written by hand (ICC.1:2001-04)."""

from __future__ import annotations

import struct
import zlib

import numpy as np

# Adobe RGB (1998): the primaries adapted to D50, and the exponent of its curve. Columns are red, green and blue.
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
ADOBE_GAMMA = 563 / 256
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def adobe_profile() -> bytes:
    def xyz(values) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * ADOBE_GAMMA)) + bytes(2)
    name = b"desc" + bytes(4) + struct.pack(">I", 12) + b"Adobe RGB X\0" + bytes(90)
    tags = {b"desc": name, b"cprt": b"text" + bytes(4) + b"none\0\0\0\0", b"wtpt": xyz((0.9642, 1.0, 0.8249))}
    tags |= {name: xyz(ADOBE[:, place]) for place, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    table, data, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content
    size = 128 + len(table) + len(data)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)  # the illuminant, D50
    return header.ljust(128, b"\0") + table + data


def adobe_to_srgb(colour: tuple[int, int, int]) -> np.ndarray:
    """The closed form, for colours inside of sRGB."""
    linear = np.linalg.inv(SRGB) @ ADOBE @ (np.array(colour) / 255) ** ADOBE_GAMMA
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def png_16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel: grey (H, W), grey and alpha (H, W, 2), RGB or RGBA."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    rows = values.reshape(values.shape[0], -1).astype(">u2")
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff(values: np.ndarray) -> bytes:
    """A TIFF of one strip, of any type of numbers (TIFF 6.0, section 2 and SampleFormat): (H, W) or (H, W, 3)."""
    channels = 1 if values.ndim == 2 else values.shape[2]
    bits, form = 8 * values.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    entries = [
        (256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, 1 if channels == 1 else 2),
        (273, 4, 8), (277, 3, channels), (278, 4, values.shape[0]), (279, 4, len(data)), (339, 3, form),
    ]  # fmt: skip
    directory, behind, more = struct.pack("<H", len(entries)), 8 + len(data), b""
    for tag, kind, value in entries:
        if channels == 3 and tag in (258, 339):
            directory += struct.pack("<HHII", tag, 3, 3, behind + 2 + 12 * len(entries) + 4 + len(more))
            more += struct.pack("<3H", *[value] * 3)
        else:
            directory += struct.pack("<HHII", tag, kind, 1, value)
    return b"II*\0" + struct.pack("<I", behind) + data + directory + bytes(4) + more
