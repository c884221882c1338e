-- Moves the ends of leases. ARGV[4] is the lease; then of each claim the subscription's name, seq and token. Answers with
-- a 1 for each claim that is held, and a 0 for each that is not.

local ends, names, wanted = int(now + tonumber(ARGV[4])), {}, lists()
for at = 5, #ARGV, 3 do
  names[#names + 1] = ARGV[at]
end
local ids = fetch(P .. 'subs', names)
for i, sub in ipairs(ids) do
  if sub then wanted[sub][#wanted[sub] + 1] = ARGV[3 * i + 3] end
end
for sub, seqs in pairs(wanted) do
  load_deliveries(sub, seqs)
end
local answers, places = {}, lists()
for i, sub in ipairs(ids) do
  local seq = ARGV[3 * i + 3]
  local d = sub and deliveries[sub][seq]
  local is_held = d and d[STAGE] == LEASED and d[TOKEN] == ARGV[3 * i + 4]
  if is_held then
    local list = places[sub]
    list[#list + 1] = ends
    list[#list + 1] = seq
  end
  answers[i] = is_held and '1' or '0'
end
for sub, list in pairs(places) do
  many('ZADD', P .. 'l:' .. sub, list)
end
return table.concat(answers)
