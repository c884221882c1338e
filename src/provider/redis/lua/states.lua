-- The deliveries of events, whose seqs are the arguments. Answers for each with nothing where there is no such event, or
-- with a list: of each delivery the subscription's name, its record, and its attempts' records.

local seqs = {}
for at = 4, #ARGV do
  seqs[#seqs + 1] = ARGV[at]
end
local answers, wanted, subs = {}, lists(), {}
local events = fetch(P .. 'ev', seqs)
for i, text in ipairs(events) do
  answers[i] = {}
  if text then
    events[i] = subs_of(read_event(text))
    for _, sub in ipairs(events[i]) do
      if #wanted[sub] == 0 then subs[#subs + 1] = sub end
      wanted[sub][#wanted[sub] + 1] = seqs[i]
    end
  end
end
local names, states, attempts = {}, {}, {}
for i, name in ipairs(fetch(P .. 'names', subs)) do
  names[subs[i]] = name
end
for _, sub in ipairs(subs) do
  local list, own = wanted[sub], {}
  local records_of = fetch(P .. 'a:' .. sub, list)
  for i, text in ipairs(fetch(P .. 'd:' .. sub, list)) do
    own[list[i]] = { text, records_of[i] }
  end
  states[sub] = own
end
for i, of in ipairs(events) do
  if of then
    local answer = answers[i]
    answer[1] = '1'
    for _, sub in ipairs(of) do
      local one = states[sub][seqs[i]]
      if one and one[1] then
        answer[#answer + 1] = names[sub] or ''
        answer[#answer + 1] = one[1]
        answer[#answer + 1] = one[2] or ''
      end
    end
  end
end
return answers
