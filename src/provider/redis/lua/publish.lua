-- Appends a batch: all of it or, on an error, nothing. Answers with the epoch, the time, and a record per event.

ensure_log()
local chosen, at = read_lists(4)
local places = {}
while ARGV[at] do
  places[#places + 1] = at
  at = at + 7
end
local answers = append_events(places, chosen)
local text = {}
for i, answer in ipairs(answers) do
  text[i] = pack('<dBc1', tonumber(answer[1]), answer[2], answer[3])
end
finish(true)
return { call('HGET', meta, 'epoch'), int(now), table.concat(text) }
