import asyncio, io, time, json, hashlib, os
from pathlib import Path
import aiohttp, pytest
from tests.envoy.test_server_envoy import *
from tests.envoy.test_server_envoy import running, route, prompt
pytestmark = pytest.mark.envoy
def strict(*names): return {"disallow_all": True, "allow_expression": {"regex": "^(" + "|".join(names) + ")$"}}
CASES = {
 "nolen": (BUFFERED, dict(mutation_rules=strict("content-type","retry-after"))),
 "nolen_allow": (BUFFERED, dict(mutation_rules=strict("content-type","retry-after"), allow_content_length_header=True)),
 "norules": (BUFFERED, {}),
 "duplex_strict": (DUPLEX, dict(mutation_rules=STRICT)),
 "duplex_nolen": (DUPLEX, dict(mutation_rules=strict("content-type","retry-after"))),
 "duplex_resp": ({**DUPLEX, "response_header_mode":"SEND","response_body_mode":"FULL_DUPLEX_STREAMED","response_trailer_mode":"SEND"}, {}),
 "streamed": ({**SEND,"request_body_mode":"STREAMED"}, {}),
 "early": ({**SEND,"request_body_mode":"STREAMED"}, dict(send_body_without_waiting_for_header_response=True)),
 "early_resp": ({**SEND,"request_body_mode":"STREAMED","request_trailer_mode":"SEND","response_header_mode":"SEND"}, dict(send_body_without_waiting_for_header_response=True)),
 "partial": ({**SEND,"request_body_mode":"BUFFERED_PARTIAL"}, {}),
 "none": ({**SEND,"request_body_mode":"NONE"}, {}),
 "skipheaders": ({"request_header_mode":"SKIP","response_header_mode":"SKIP","request_body_mode":"BUFFERED"}, {}),
 "response_only": ({"request_header_mode":"SKIP","response_header_mode":"SEND","request_body_mode":"NONE","response_body_mode":"STREAMED"}, {}),
 "buffered_resp": ({**BUFFERED,"response_header_mode":"SEND","response_body_mode":"STREAMED","request_trailer_mode":"SEND"}, {}),
}
@pytest.mark.parametrize("case", CASES)
async def test_probe(case, tmp_path):
    mode, more = CASES[case]
    async with running(tmp_path, [route(B)], mode, **more) as at:
        async def one(label, path, data, method="POST", chunked=False):
            try:
                async def gen():
                    for i in range(0, len(data), 100_000): yield data[i:i+100_000]
                async with at.session.request(method, at.url+path, data=(gen() if chunked else io.BytesIO(data)) if data is not None else None, headers={"content-type":"application/json"}, timeout=aiohttp.ClientTimeout(8)) as r:
                    t = await r.read()
                    try: j = json.loads(t); res = (j.get("name"), j.get("size"), j["headers"].get("content-length"), j["headers"].get("transfer-encoding"), len(data) if data else None, j["headers"].get("x-gateway-destination-endpoint"))
                    except Exception: res = t[:200]
                    print(case, label, r.status, res)
            except Exception as e: print(case, label, repr(e))
        for _ in range(3): await one("small", CHAT, prompt(100))
        await one("3MB", CHAT, prompt(3_000_000))
        await one("3MB chunked", CHAT, prompt(3_000_000), chunked=True)
        await one("rewrite", CHAT, prompt(10, stream=True))
        await one("rewrite3MB", CHAT, prompt(3_000_000, stream=True))
        await one("unread", "/tokenize", b"y"*500_000)
        await one("unread chunked", "/tokenize", b"y"*2_500_000, chunked=True)
        await one("get", "/v1/models", None, "GET")
        await one("empty post", CHAT, None, "POST")
        await one("empty chunked", CHAT, b"", "POST", chunked=True)
        at.router.verdicts[:] = [Reject(Refusal.NO_REPLICAS)]
        await one("refused", CHAT, prompt(100))
        print(at.server.streams, at.server.entries)
