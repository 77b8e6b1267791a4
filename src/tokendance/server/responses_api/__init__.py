"""/v1/responses: the chat path with another face.

bodies.py    what clients send: items in place of messages
as_chat.py   makes a chat request of it
output.py    makes output items and stream events of the answer, as it grows
items.py     lists items as they are remembered
kept.py      remembers answers, each for the tenant that asked
endpoint.py  puts them around `ChatEndpoint`, which does all the rest
"""
