# SPDX-License-Identifier: Apache-2.0
"""The router: owns every client stream, places requests, drives every migration.

service.py   Dynamo endpoints; the life of one request
stream.py    one client stream: legs to workers, spliced by token index
outputs.py   one connection to each worker, for the outputs of all requests there
workers.py   which workers there are, how loaded they are, calls to them
openai.py    Dynamo's request and response dictionaries to and from our structs
client.py    the router's control endpoint, for the command line and the planner
"""
