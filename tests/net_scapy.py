"""scapy's MACsec as an independent end, in a process of its own (scapy is GPL; sealfs is not).

Reads one JSON document a line, answers with one: {"do": "seal" or "open", "key", "salt", "ssci",
"sci", "an", "pn", "frame"}, all but the numbers in hex. Shares nothing with sealfs.
"""

import json
import sys

from scapy.contrib.macsec import MACsec, MACsecSA
from scapy.layers.l2 import Ether
from scapy.packet import bind_layers

bind_layers(Ether, MACsec, type=0x88E5)


def answer(request: dict[str, object]) -> dict[str, object]:
    def raw(name: str) -> bytes:
        return bytes.fromhex(str(request[name]))

    association = MACsecSA(
        sci=raw("sci"), an=request["an"], pn=request["pn"], key=raw("key"), icvlen=16,
        encrypt=1, send_sci=1, xpn_en=True, ssci=request["ssci"], salt=raw("salt"),
    )  # fmt: skip
    frame = Ether(raw("frame"))
    if request["do"] == "seal":
        found = association.encrypt(association.encap(frame))
        return {"frame": bytes(found).hex()}
    tag = frame[MACsec]
    fields = {name: int(getattr(tag, name)) for name in ("SC", "E", "C", "AN", "SL", "PN")}
    fields["SCI"] = bytes(tag.SCI).hex() if not isinstance(tag.SCI, int) else tag.SCI
    try:
        opened = association.decap(association.decrypt(frame))
    except Exception as exc:  # what cryptography raises for a wrong tag
        return {"error": type(exc).__name__, "tag": fields}
    return {"frame": bytes(opened).hex(), "tag": fields}


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
