"""An agent that asks for tasks itself: no server, no open port. Run as many of these as you like.

pip install openai httpx
python agent_pull.py http://127.0.0.1:8090
"""

import sys

import httpx
import openai


def play(task: dict, client: openai.OpenAI, model: str) -> float:
    """Your agent, as it is; what it returns is the reward."""
    reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": task["prompt"]}])
    return float(task["answer"] in (reply.choices[0].message.content or ""))


def work(gateway: str, key: str = "none") -> bool:
    """One episode; False when there is no task now."""
    headers = {"Authorization": f"Bearer {key}"}
    started = httpx.post(f"{gateway}/rl/start_session", json={"wait_s": 20}, headers=headers, timeout=60)
    if started.status_code == 429:
        return False
    session = started.raise_for_status().json()
    with openai.OpenAI(base_url=session["base_url"], api_key=session["api_key"]) as client:
        reward = play(session["task"], client, session["model"])
    httpx.post(f"{session['session_url']}/rl/end_session", json={"reward": reward}).raise_for_status()
    return True


if __name__ == "__main__":
    while True:
        work(*sys.argv[1:])
